//! The cache under damage, company and sudden death.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{PoisonError, RwLock};
use std::thread;
use std::time::{Duration, SystemTime};

use super::*;

/// A process that starts has, until it runs its program, a copy of every lock of this one. So those tests that start
/// one run while no other test holds a lock.
static STARTS: RwLock<()> = RwLock::new(());

fn no_process_starts() -> impl Drop {
    STARTS.read().unwrap_or_else(PoisonError::into_inner)
}

fn no_lock_is_held() -> impl Drop {
    STARTS.write().unwrap_or_else(PoisonError::into_inner)
}

fn key(driver: &str) -> Key {
    Key {
        component: "decoder".to_owned(),
        files: [("decoder.onnx".to_owned(), "00".to_owned())].into(),
        provider: "tensorrt".to_owned(),
        options: [("trt_fp16_enable".to_owned(), "1".to_owned())].into(),
        runtime: "1.32.0".to_owned(),
        machine: driver.to_owned(),
        sizes: [("new".to_owned(), [1, 64, 640])].into(),
        ..Key::default()
    }
}

fn cache(dir: &tempfile::TempDir) -> CompiledCache {
    CompiledCache::open(dir.path(), u64::MAX).unwrap()
}

/// Builds an entry of `bytes` bytes.
fn built(cache: &CompiledCache, key: &Key, bytes: usize) -> Entry {
    cache.build(key, &mut || {}, |dir| write(dir, "engine", bytes)).unwrap()
}

fn write(dir: &Path, name: &str, bytes: usize) -> Result<()> {
    fs::write(dir.join(name), vec![7; bytes]).map_err(|e| Error::graph("decoder", "no room").because(e))
}

fn found(cache: &CompiledCache, key: &Key) -> Entry {
    match cache.find(key).unwrap() {
        Found::Whole(entry) => entry,
        other => panic!("{other:?}"),
    }
}

fn absent(cache: &CompiledCache, key: &Key) -> bool {
    matches!(cache.find(key).unwrap(), Found::Absent)
}

/// What lies in the cache beside the locks.
fn names(cache: &CompiledCache) -> Vec<String> {
    let entries = fs::read_dir(cache.dir()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name != LOCKS).collect()
}

#[test]
fn an_entry_is_found_by_its_key_and_by_no_other() {
    let _guard = no_process_starts();
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(&dir);
    let key = key("driver 1");
    assert!(absent(&cache, &key));
    let work = |dir: &Path| {
        fs::create_dir(dir.join("inner")).unwrap();
        write(dir, "inner/engine", 5)?;
        write(dir, "timing", 2)
    };
    let entry = cache.build(&key, &mut || panic!("nobody builds it"), work).unwrap();
    assert_eq!(entry.dir, dir.path().join(key.digest()));
    let again = found(&cache, &key);
    assert_eq!((again.record.bytes, &again.record.key), (7, &key));
    assert_eq!(again.record.files.keys().collect::<Vec<_>>(), ["inner/engine", "timing"]);
    assert_eq!(fs::read(again.dir.join("inner/engine")).unwrap(), [7; 5]);
    cache.build(&key, &mut || {}, |_| panic!("it is there")).unwrap();
    let others: [&dyn Fn(&mut Key); 6] = [
        &|key| key.machine = "driver 2".to_owned(),
        &|key| key.device = "1".to_owned(),
        &|key| key.runtime = "1.33.0".to_owned(),
        &|key| key.options.clear(),
        &|key| key.sizes.clear(),
        &|key| key.files = [("decoder.onnx".to_owned(), "01".to_owned())].into(),
    ];
    for change in others {
        let mut other = key.clone();
        change(&mut other);
        assert!(absent(&cache, &other), "{other:?}");
    }
}

/// Harms the record of an entry.
fn replace(dir: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(dir.join("entry.json")).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(dir.join("entry.json"), text.replace(from, to)).unwrap();
}

type Harm<'a> = &'a dyn Fn(&Path);

#[test]
fn a_damaged_entry_is_never_used_and_goes_away() {
    let _guard = no_process_starts();
    let harms: [(&str, Harm<'_>); 8] = [
        ("its hash is another one", &|dir| fs::write(dir.join("engine"), [8; 3]).unwrap()),
        ("has 2 bytes, 3 were built", &|dir| fs::write(dir.join("engine"), [7; 2]).unwrap()),
        ("cannot be read", &|dir| fs::remove_file(dir.join("engine")).unwrap()),
        ("entry.json cannot be read", &|dir| fs::remove_file(dir.join("entry.json")).unwrap()),
        ("is no record", &|dir| fs::write(dir.join("entry.json"), "{").unwrap()),
        ("another version", &|dir| replace(dir, "\"format\": 2", "\"format\": 1")),
        ("something else", &|dir| replace(dir, "1.32.0", "1.31.0")),
        ("outside of its entry", &|dir| replace(dir, "\"engine\"", "\"../engine\"")),
    ];
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(&dir);
    let key = key("driver");
    for (expected, harm) in harms {
        let entry = built(&cache, &key, 3);
        harm(&entry.dir);
        let Found::Damaged(why) = cache.find(&key).unwrap() else { panic!("{expected}") };
        assert!(why.contains(expected), "{why}");
        assert_eq!(names(&cache).len(), 1, "it stays while it is in use");
        let refused = cache.build(&key, &mut || panic!("nobody builds it"), |_| panic!("it is in use"));
        assert!(refused.unwrap_err().to_string().contains("another process uses it"));
        drop(entry);
        assert!(matches!(cache.find(&key).unwrap(), Found::Damaged(_)));
        assert!(names(&cache).is_empty(), "{expected}");
        assert!(absent(&cache, &key));
    }
    let entry = built(&cache, &key, 3);
    harms[0].1(&entry.dir);
    drop(entry);
    assert_eq!(built(&cache, &key, 4).record.bytes, 4, "a build replaces it");
}

#[test]
fn a_failed_build_leaves_nothing() {
    let _guard = no_process_starts();
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(&dir);
    let key = key("driver");
    let fail = |work: &dyn Fn(&Path) -> Result<()>| {
        let error = cache.build(&key, &mut || {}, work).unwrap_err().to_string();
        assert!(names(&cache).is_empty(), "{error}");
        error
    };
    let full = fail(&|dir| {
        write(dir, "engine", 3)?;
        let cause = io::Error::from(io::ErrorKind::StorageFull);
        Err(Error::graph("decoder", "the engine cannot be written").because(cause))
    });
    assert!(
        full.ends_with(": the disk is full; free some, lower the cache's limit, or use another directory"),
        "{full}"
    );
    let own = fail(&|_| Err(Error::graph("decoder", "operator 7 is unknown")));
    assert_eq!(own, "graph decoder: operator 7 is unknown");
    assert!(fail(&|_| Ok(())).ends_with("provider tensorrt compiled nothing to keep"));
    assert!(fail(&|dir| write(dir, "entry.json", 1)).ends_with("something that cannot be kept"));
    #[cfg(unix)]
    assert!(
        fail(&|dir| {
            std::os::unix::fs::symlink("/etc/hostname", dir.join("link")).unwrap();
            Ok(())
        })
        .ends_with("something that cannot be kept")
    );
}

#[test]
fn two_that_build_at_once_build_once() {
    let _guard = no_process_starts();
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(&dir);
    let key = key("driver");
    let builds = AtomicUsize::new(0);
    let (started, begun) = mpsc::channel();
    let (waits, waiting) = mpsc::channel();
    thread::scope(|scope| {
        let (cache, key, builds) = (&cache, &key, &builds);
        scope.spawn(move || {
            let work = |dir: &Path| {
                builds.fetch_add(1, Ordering::SeqCst);
                started.send(()).unwrap();
                waiting.recv_timeout(Duration::from_mins(1)).unwrap();
                write(dir, "engine", 3)
            };
            cache.build(key, &mut || panic!("it is the first"), work).unwrap();
        });
        begun.recv_timeout(Duration::from_mins(1)).unwrap();
        assert!(absent(cache, key), "a half-built entry is none");
        assert_eq!(cache.prune(0).unwrap().removed, [], "and is not removed");
        assert_eq!(cache.list().unwrap()[0].state, State::Building);
        let work = |_: &Path| panic!("the first has built it");
        let entry = cache.build(key, &mut || waits.send(()).unwrap(), work).unwrap();
        assert_eq!(entry.record.bytes, 3);
    });
    assert_eq!(builds.into_inner(), 1);
}

#[test]
fn what_was_used_longest_ago_goes_first_and_nothing_in_use_goes() {
    let _guard = no_process_starts();
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(&dir);
    let keys = ["a", "b", "c", "d"].map(key);
    let mut sizes = Vec::new();
    for (age, key) in [30, 40, 10, 20].into_iter().zip(&keys) {
        let entry = built(&cache, key, 1000);
        let used = File::options().append(true).open(entry.dir.join(USED)).unwrap();
        used.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
        sizes.push(cache.list().unwrap().iter().map(|one| one.bytes).max().unwrap());
    }
    let order = |listed: &[Listed]| -> String {
        listed.iter().map(|one| one.key.as_ref().unwrap().machine.as_str()).collect()
    };
    let listed = cache.list().unwrap();
    assert_eq!(order(&listed), "cdab");
    assert!(listed.iter().all(|one| one.state == State::Whole && one.created > 0 && one.last_used > 0));
    let size = sizes[0];
    assert!(size > 1000 && sizes.iter().all(|one| *one == size), "the record counts too: {sizes:?}");
    // The oldest is used, which also makes it the youngest afterwards.
    let in_use = found(&cache, &keys[1]);
    let pruned = cache.prune(3 * size).unwrap();
    assert_eq!((order(&pruned.removed).as_str(), pruned.freed, pruned.kept), ("a", size, 3 * size));
    let pruned = cache.prune(0).unwrap();
    assert_eq!((order(&pruned.removed).as_str(), pruned.kept), ("dc", size));
    assert_eq!(cache.list().unwrap()[0].state, State::InUse);
    drop(in_use);
    // A build holds the cache to its limit; what it built stays.
    let small = CompiledCache::open(dir.path(), size + 10).unwrap();
    let entry = built(&small, &keys[0], 1000);
    assert_eq!(order(&small.list().unwrap()), "a");
    drop(entry);
}

#[test]
fn pruning_removes_what_was_abandoned_or_damaged_and_touches_nothing_foreign() {
    let _guard = no_process_starts();
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(&dir);
    let (whole, damaged, dead) = (key("whole"), key("damaged"), key("dead"));
    drop(built(&cache, &whole, 3));
    let entry = built(&cache, &damaged, 3);
    fs::write(entry.dir.join("entry.json"), "").unwrap();
    drop(entry);
    let partial = dir.path().join(format!(".partial-{}", dead.digest()));
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("engine"), "half").unwrap();
    fs::write(dir.path().join("notes.txt"), "mine").unwrap();
    assert!(absent(&cache, &dead));
    let pruned = cache.prune(u64::MAX).unwrap();
    let mut states: Vec<String> = pruned.removed.iter().map(|one| format!("{:?}", one.state)).collect();
    states.sort();
    assert_eq!(states[0], "Abandoned");
    assert!(states[1].starts_with("Damaged(") && states.len() == 2, "{states:?}");
    let mut left = names(&cache);
    left.sort();
    assert_eq!(left, [whole.digest(), "notes.txt".to_owned()]);
}

#[test]
fn a_cache_that_cannot_be_written_is_refused_and_can_still_be_read() {
    let _guard = no_process_starts();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let error = CompiledCache::open(&dir.path().join("file/cache"), 0).unwrap_err();
    assert!(error.to_string().contains("/file/cache: it cannot be written"), "{error}");
    assert_eq!(error.kind(), crate::ErrorKind::Provider);
    let key = key("driver");
    drop(built(&cache(&dir), &key, 3));
    let shipped = CompiledCache::read_only(dir.path());
    let used = dir.path().join(key.digest()).join(USED);
    let before = used.metadata().unwrap().modified().unwrap();
    assert_eq!(found(&shipped, &key).record.bytes, 3);
    assert_eq!(used.metadata().unwrap().modified().unwrap(), before, "nothing is written");
    assert_eq!(shipped.list().unwrap()[0].state, State::Whole);
    assert!(shipped.build(&key, &mut || {}, |_| Ok(())).is_err());
    fs::remove_dir_all(dir.path().join(LOCKS)).unwrap();
    assert_eq!(found(&shipped, &key).record.bytes, 3, "a copy without its locks serves too");
}

#[test]
fn a_session_that_writes_gets_a_copy_which_goes_with_it() {
    let _guard = no_process_starts();
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(&dir);
    let key = key("driver");
    let work = |dir: &Path| {
        fs::create_dir(dir.join("inner")).unwrap();
        write(dir, "inner/engine", 5)
    };
    let entry = cache.build(&key, &mut || {}, work).unwrap();
    let copy = entry.copy().unwrap();
    assert!(copy.dir().starts_with(dir.path()), "{copy:?}");
    fs::write(copy.dir().join("inner/engine"), "another").unwrap();
    fs::write(copy.dir().join("timings"), "more").unwrap();
    assert_eq!(found(&cache, &key).record.files.len(), 1, "the entry is as it was");
    cache.prune(u64::MAX).unwrap();
    assert!(copy.dir().join("timings").exists(), "it is in use");
    drop(copy);
    assert_eq!(names(&cache), [key.digest()]);
    let left = dir.path().join(".copy-dead");
    fs::create_dir(&left).unwrap();
    cache.prune(u64::MAX).unwrap();
    assert!(left.exists(), "it may be about to be locked");
    fs::write(left.join("lock"), "").unwrap();
    cache.prune(u64::MAX).unwrap();
    assert_eq!(names(&cache), [key.digest()]);
    // Where the cache cannot be written there are other places.
    let shipped = Entry { dir: dir.path().join("none").join(key.digest()), ..found(&cache, &key) };
    assert!(shipped.copy().is_err(), "its files are not there");
}

#[test]
fn a_cache_that_is_only_named_is_made_by_the_first_build_and_an_entry_can_be_thrown_away() {
    let _guard = no_process_starts();
    let dir = tempfile::tempdir().unwrap();
    let cache = CompiledCache::at(&dir.path().join("a/b"), u64::MAX);
    let key = key("driver");
    assert!(absent(&cache, &key));
    assert_eq!(cache.list().unwrap(), []);
    assert!(!dir.path().join("a").exists());
    let entry = built(&cache, &key, 3);
    assert!(!cache.discard(&key.digest()).unwrap(), "it is in use");
    drop(entry);
    assert!(cache.discard(&key.digest()).unwrap());
    assert!(absent(&cache, &key));
    fs::write(dir.path().join("file"), "").unwrap();
    let error = CompiledCache::at(&dir.path().join("file/c"), 0).build(&key, &mut || {}, |_| Ok(()));
    assert!(error.unwrap_err().to_string().contains("it cannot be written"));
}

#[test]
fn a_large_file_is_hashed_when_it_was_written_since() {
    let _guard = no_process_starts();
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(&dir);
    let key = key("driver");
    let work = |dir: &Path| {
        // Too large to be hashed at each use; the disk holds nothing of it.
        File::create(dir.join("weights")).and_then(|file| file.set_len((64 << 20) + 1)).unwrap();
        Ok(())
    };
    let weights = cache.build(&key, &mut || {}, work).unwrap().dir.join("weights");
    let file = File::options().write(true).open(&weights).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_hours(1)).unwrap();
    drop(found(&cache, &key));
    let mut file = File::options().write(true).open(&weights).unwrap();
    std::io::Write::write_all(&mut file, &[7]).unwrap();
    let Found::Damaged(why) = cache.find(&key).unwrap() else { panic!("it was changed") };
    assert!(why.contains("its hash is another one"), "{why}");
}

const CHILD: &str = "LLAVA_PHI_TEST_CACHE";

/// Not a test of its own: what the other process does.
#[test]
#[ignore = "the other process of the tests below"]
fn child() {
    let Ok(dir) = std::env::var(CHILD) else { return };
    let cache = CompiledCache::open(Path::new(&dir), u64::MAX).unwrap();
    let work = |dir: &Path| {
        write(dir, "engine", 3)?;
        println!("\nbuilding");
        // Until the parent closes the pipe, or kills.
        let _ = io::stdin().read_line(&mut String::new());
        Ok(())
    };
    cache.build(&key("driver"), &mut || {}, work).unwrap();
}

/// Another process that is in the middle of a build.
fn other_process(dir: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "compiled::tests::child", "--ignored", "--nocapture"])
        .env(CHILD, dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    assert!(lines.by_ref().map_while(io::Result::ok).any(|line| line == "building"));
    child
}

#[test]
fn a_process_waits_for_another_and_takes_what_it_built() {
    let _guard = no_lock_is_held();
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(&dir);
    let key = key("driver");
    let mut child = other_process(dir.path());
    assert!(absent(&cache, &key));
    let mut stdin = child.stdin.take();
    let entry = cache.build(&key, &mut || drop(stdin.take()), |_| panic!("the other builds it")).unwrap();
    assert_eq!(entry.record.bytes, 3);
    child.wait().unwrap();
}

#[test]
fn a_killed_process_leaves_what_the_next_pruning_or_build_removes() {
    let _guard = no_lock_is_held();
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(&dir);
    let key = key("driver");
    let kill = || {
        let mut child = other_process(dir.path());
        assert_eq!(cache.prune(0).unwrap().removed, []);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(names(&cache), [format!(".partial-{}", key.digest())]);
    };
    kill();
    assert!(absent(&cache, &key));
    assert_eq!(cache.prune(u64::MAX).unwrap().removed[0].state, State::Abandoned);
    assert!(names(&cache).is_empty());
    kill();
    assert_eq!(built(&cache, &key, 4).record.bytes, 4);
    assert_eq!(names(&cache), [key.digest()]);
}
