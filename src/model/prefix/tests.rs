//! Snapshots, directories and the memory of prefixes, without a model.

use std::fs;
use std::time::{Duration, SystemTime};

use tempfile::TempDir;

use super::*;
use crate::model::kv_cache::{Piece, RowLayout};
use crate::package::manifest::{DType, DecoderSpec, KvForm, KvSpec};
use crate::runtime::{CacheMemory, testing};

const ROWS: usize = 6;

fn spec() -> DecoderSpec {
    DecoderSpec {
        layers: 2,
        kv_heads: 3,
        head_dim: 5,
        hidden: 30,
        context: 512,
        logits_width: 9,
        rotary: None,
    }
}

fn kv(form: KvForm, dtype: DType) -> KvSpec {
    KvSpec { form, dtype, capacity: Some(512), chunk: Some(8) }
}

/// A cache of some form with nothing in it.
fn cache(form: KvForm, dtype: DType) -> KvCache {
    testing::start();
    KvCache::new(&spec(), kv(form, dtype), None, &CacheMemory::default()).unwrap()
}

fn layout(dtype: DType) -> RowLayout {
    cache(KvForm::Concat, dtype).layout()
}

/// Text, then the images with these pixels, with a token behind each.
fn prompt(text: std::ops::Range<u32>, images: &[u8]) -> Vec<PositionKey> {
    let mut keys: Vec<_> = text.map(PositionKey::Token).collect();
    for pixels in images {
        keys.extend((0..ROWS).map(|row| PositionKey::Image { hash: [*pixels; 32], row }));
        keys.push(PositionKey::Token(1000));
    }
    keys
}

/// The rows of one position: they depend on everything up to it, as real ones do.
fn row(keys: &[PositionKey], at: usize, tensor: usize, head: usize, dtype: DType) -> Vec<u8> {
    let digest = scope::after(&[0; 32], &keys[..=at]);
    let byte = |n: usize| digest[(n + tensor * 7 + head * 3) % 32] & 0x3b;
    (0..5 * dtype.bytes()).map(byte).collect()
}

/// The rows of `keys` from `from` on, as [`KvCache::export`] gives them.
fn rows(keys: &[PositionKey], from: usize, dtype: DType) -> Vec<u8> {
    let mut all = Vec::new();
    for tensor in 0..4 {
        for head in 0..3 {
            (from..keys.len()).for_each(|at| all.extend(row(keys, at, tensor, head, dtype)));
        }
    }
    all
}

/// Lets `cache` hold `keys`, as if the decoder had read those that it lacks.
fn read(cache: &mut KvCache, keys: &[PositionKey], dtype: DType) {
    let held = cache.common_prefix(keys);
    cache.truncate(held).unwrap();
    cache.reserve(keys.len()).unwrap();
    let bytes = rows(keys, held, dtype);
    let height = keys.len() - held;
    cache.import(&keys[held..], &[Piece { bytes: &bytes, height, wanted: 0..height }]).unwrap();
}

fn scope_of(variant: &str) -> Scope {
    let served = |component: &str| Served {
        component: component.to_owned(),
        variant: variant.to_owned(),
        provider: "cpu".to_owned(),
        kernels: None,
        options: [].into(),
    };
    Scope {
        program: "1".to_owned(),
        package: "abc".to_owned(),
        components: ["vision_encoder", "projector", "decoder"].map(served).into(),
        runtime: "1".to_owned(),
        processor: "x".to_owned(),
        layout: layout(DType::F32),
    }
}

fn prefixes(memory: u64, directory: Option<&PrefixDirectory>, told: &Arc<Mutex<Vec<String>>>) -> Prefixes {
    let told = Arc::clone(told);
    let notices = NoticeSink::new(move |notice| told.lock().unwrap().push(notice.to_string()));
    let memory = (memory, "a test".to_owned());
    Prefixes::new("model", scope_of("v"), memory, directory.cloned().map(Arc::new), Some(notices))
}

/// Reads `keys` as the model does, and says where they came from.
fn ask(prefixes: &mut Prefixes, cache: &mut KvCache, keys: &[PositionKey]) -> CachedFrom {
    let found = prefixes.restore(cache, keys, &[], &Canceler::default()).unwrap();
    let from = found.from;
    assert_eq!(from.total(), cache.len());
    assert_eq!(cache.export(&(0..cache.len())).unwrap(), rows(&keys[..cache.len()], 0, DType::F32));
    read(cache, keys, DType::F32);
    prefixes.write(cache, keys, found);
    from
}

fn files(dir: &TempDir) -> Vec<PathBuf> {
    let all = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
    let mut all: Vec<_> = all.filter(|path| path.is_file()).collect();
    all.sort();
    all
}

const PLENTY: u64 = 1 << 20;

#[test]
fn every_form_gives_its_rows_and_takes_them() {
    for (form, dtype) in [
        (KvForm::Shared, DType::F32),
        (KvForm::Shared, DType::F16),
        (KvForm::Scatter, DType::F32),
        (KvForm::Concat, DType::F16),
    ] {
        let keys = prompt(0..40, &[1, 2]);
        let mut one = cache(form, dtype);
        read(&mut one, &keys[..20], dtype);
        read(&mut one, &keys, dtype);
        assert_eq!(one.export(&(0..keys.len())).unwrap(), rows(&keys, 0, dtype), "{form:?}");
        let mut other = cache(form, dtype);
        let bytes = one.export(&(10..30)).unwrap();
        let first = one.export(&(0..10)).unwrap();
        let pieces = [
            Piece { bytes: &first, height: 10, wanted: 0..10 },
            Piece { bytes: &bytes, height: 20, wanted: 0..5 },
        ];
        other.import(&keys[..15], &pieces).unwrap();
        let rest = Piece { bytes: &bytes, height: 20, wanted: 5..20 };
        other.import(&keys[15..30], &[rest]).unwrap();
        assert_eq!(other.export(&(0..30)).unwrap(), rows(&keys[..30], 0, dtype), "{form:?}");
        assert_eq!(other.positions(), &keys[..30]);
        let short = Piece { bytes: &bytes[1..], height: 20, wanted: 0..20 };
        assert!(cache(form, dtype).import(&keys[10..30], &[short]).is_err());
    }
}

#[test]
fn two_conversations_in_turn_are_read_once_and_share_what_is_equal() {
    let told = Arc::default();
    let mut prefixes = prefixes(PLENTY, None, &told);
    let mut cache = cache(KvForm::Shared, DType::F32);
    let long = |images: &[u8], end: u32| {
        let mut keys = prompt(0..20, images);
        keys.extend((2000..2000 + end).map(PositionKey::Token));
        keys
    };
    let (a, b) = (long(&[1], 30), long(&[2], 30));
    assert_eq!(ask(&mut prefixes, &mut cache, &a).total(), 0);
    assert_eq!(ask(&mut prefixes, &mut cache, &b), CachedFrom { working: 20, ..CachedFrom::default() });
    let alone = prefixes.report().memory_used;
    // All of the first conversation but nothing twice: it goes on where it was left.
    let more = long(&[1], 50);
    let from = ask(&mut prefixes, &mut cache, &more);
    assert_eq!(from, CachedFrom { working: 20, memory: a.len() - 20, ..CachedFrom::default() });
    let both = prefixes.report().memory_used;
    assert!(both < 2 * alone, "the system text is kept once: {alone}, {both}");
    let from = ask(&mut prefixes, &mut cache, &b);
    assert_eq!((from.working, from.memory), (20, b.len() - 20));
    // Images in another order stand at other places: only the text before is equal.
    let from = ask(&mut prefixes, &mut cache, &long(&[1, 2], 3));
    assert_eq!(from.total(), 20 + ROWS + 1);
    let from = ask(&mut prefixes, &mut cache, &long(&[2, 1], 3));
    assert_eq!(from.total(), 20 + ROWS + 1);
    assert_eq!(told.lock().unwrap().len(), 0);
}

#[test]
fn a_tail_of_text_is_read_again_rather_than_that_an_image_is_copied() {
    let told = Arc::default();
    let mut prefixes = prefixes(PLENTY, None, &told);
    let mut cache = cache(KvForm::Shared, DType::F32);
    let question = |first: u32, length: u32| {
        let mut keys = prompt(0..100, &[1]);
        keys.extend((first..first + length).map(PositionKey::Token));
        keys
    };
    for first in [3000, 4000, 5000] {
        ask(&mut prefixes, &mut cache, &question(first, 17));
    }
    assert_eq!(prefixes.report().memory_used, 0);
    ask(&mut prefixes, &mut cache, &question(6000, 60));
    ask(&mut prefixes, &mut cache, &question(7000, 17));
    assert!(prefixes.report().memory_used > 0);
}

#[test]
fn memory_keeps_its_limit_and_lets_go_what_was_used_longest_ago() {
    let told = Arc::default();
    let position = (layout(DType::F32).position_bytes() + size_of::<PositionKey>()) as u64;
    // Three conversations of 39 positions, without the working one.
    let limit = 3 * 39 * position;
    let mut prefixes = prefixes(limit, None, &told);
    let mut cache = cache(KvForm::Shared, DType::F32);
    let talk = |n: u32| prompt(n * 100..n * 100 + 25, &[u8::try_from(n).unwrap(), 200]);
    for n in 0..4 {
        ask(&mut prefixes, &mut cache, &talk(n));
        assert!(prefixes.report().memory_used <= limit);
    }
    assert_eq!(prefixes.report().memory_used, limit, "every byte is counted");
    // The oldest is asked again, so that the second becomes the oldest.
    assert_eq!(ask(&mut prefixes, &mut cache, &talk(0)).memory, 39);
    assert!(ask(&mut prefixes, &mut cache, &talk(1)).memory < 39);
    assert_eq!(ask(&mut prefixes, &mut cache, &talk(0)).memory, 39);
    assert!(prefixes.report().memory_used <= limit);
    // Nothing is kept of what does not fit at all.
    let mut none = super::tests::prefixes(10, None, &told);
    ask(&mut none, &mut cache, &talk(5));
    ask(&mut none, &mut cache, &talk(6));
    assert_eq!(none.report().memory_used, 0);
}

#[test]
fn a_snapshot_serves_another_session_up_to_the_last_image() {
    let (dir, told) = (TempDir::new().unwrap(), Arc::default());
    let directory = PrefixDirectory::at(dir.path(), PLENTY);
    let keys = prompt(0..20, &[1, 2]);
    let mut first = prefixes(0, Some(&directory), &told);
    assert_eq!(ask(&mut first, &mut cache(KvForm::Shared, DType::F32), &keys).total(), 0);
    drop(first);
    let [file] = &files(&dir)[..] else { panic!("{:?}", files(&dir)) };
    assert!(snapshot::is_safetensors(&fs::read(file).unwrap()));
    let last = keys.len() - 1;
    let mut second = prefixes(0, Some(&directory), &told);
    let mut caches = [KvForm::Shared, KvForm::Concat, KvForm::Scatter].map(|form| cache(form, DType::F32));
    for cache in &mut caches {
        assert_eq!(ask(&mut second, cache, &keys).disk, last);
    }
    // Any prefix of it counts where it holds an image more; the rest is read.
    let mut other = prompt(0..20, &[1]);
    other.push(PositionKey::Token(77));
    let mut fresh = cache(KvForm::Shared, DType::F32);
    assert_eq!(ask(&mut second, &mut fresh, &other).disk, 20 + ROWS + 1);
    assert_eq!(ask(&mut second, &mut cache(KvForm::Shared, DType::F32), &prompt(0..20, &[])).disk, 0);
    assert_eq!(ask(&mut second, &mut cache(KvForm::Shared, DType::F32), &prompt(1..20, &[1, 2])).disk, 0);
    drop(second);
    assert_eq!(files(&dir).len(), 2);
    // One that begins with another replaces it.
    let mut third = prefixes(0, Some(&directory), &told);
    let longer = prompt(0..20, &[1, 2, 3]);
    assert_eq!(ask(&mut third, &mut cache(KvForm::Shared, DType::F32), &longer).disk, last);
    drop(third);
    let listed = directory.list().unwrap();
    let mut sizes: Vec<_> = listed.iter().map(|one| one.content.as_ref().unwrap().positions).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [19 + 2 * ROWS + 1, 20 + 3 * ROWS + 2]);
    assert_eq!(*told.lock().unwrap(), [""; 0]);
}

#[test]
fn what_is_not_as_it_was_written_is_refused_told_once_and_written_anew() {
    let keys = prompt(0..20, &[1]);
    let write = |dir: &TempDir| {
        let directory = PrefixDirectory::at(dir.path(), PLENTY);
        let mut prefixes = prefixes(0, Some(&directory), &Arc::default());
        ask(&mut prefixes, &mut cache(KvForm::Shared, DType::F32), &keys);
        drop(prefixes);
        (directory, files(dir)[0].clone())
    };
    let whole = {
        let dir = TempDir::new().unwrap();
        fs::read(write(&dir).1).unwrap()
    };
    let place = |what: &str| whole.windows(what.len()).position(|part| part == what.as_bytes()).unwrap();
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        bytes
    };
    let cases = [
        ("a row", flipped(whole.len() - 40)),
        ("the hash", flipped(place("sha256") + 12)),
        ("a token", flipped(place("tokens") + 12)),
        ("a tensor's place", flipped(place("data_offsets") + 15)),
        ("the record", flipped(place("positions"))),
        ("cut off", whole[..whole.len() - 1].to_vec()),
        ("half", whole[..whole.len() / 2].to_vec()),
        ("longer", [&whole[..], &[0]].concat()),
        ("a few bytes", whole[..5].to_vec()),
        ("empty", Vec::new()),
        ("a huge header", [&u64::MAX.to_le_bytes()[..], &whole[8..]].concat()),
        ("something else", b"\x10\0\0\0\0\0\0\0{\"a\":1}         ".to_vec()),
    ];
    for (what, bytes) in cases {
        let dir = TempDir::new().unwrap();
        let (directory, file) = write(&dir);
        fs::write(&file, bytes).unwrap();
        let told = Arc::default();
        let mut prefixes = prefixes(0, Some(&directory), &told);
        assert_eq!(ask(&mut prefixes, &mut cache(KvForm::Shared, DType::F32), &keys).total(), 0, "{what}");
        drop(prefixes);
        let told = told.lock().unwrap();
        assert!(told.len() == 1 && told[0].contains("is not used: "), "{what}: {told:?}");
        assert_eq!(fs::read(&file).unwrap().len(), whole.len(), "{what}: it was written anew");
        let mut again = super::tests::prefixes(0, Some(&directory), &Arc::default());
        assert_eq!(ask(&mut again, &mut cache(KvForm::Shared, DType::F32), &keys).disk, 20 + ROWS, "{what}");
    }
}

#[test]
fn a_snapshot_that_this_user_cannot_read_stays_as_it_is() {
    let (dir, told) = (TempDir::new().unwrap(), Arc::default());
    let directory = PrefixDirectory::at(dir.path(), PLENTY);
    let keys = prompt(0..20, &[1]);
    ask(&mut prefixes(0, Some(&directory), &Arc::default()), &mut cache(KvForm::Shared, DType::F32), &keys);
    let file = files(&dir)[0].clone();
    let whole = fs::metadata(&file).unwrap().modified().unwrap();
    let mut prefixes = prefixes(0, Some(&directory), &told);
    let denied = io::Error::from(io::ErrorKind::PermissionDenied);
    prefixes.refuse(file.clone(), &Unusable::Unreadable(denied));
    assert_eq!(ask(&mut prefixes, &mut cache(KvForm::Shared, DType::F32), &keys).total(), 0);
    drop(prefixes);
    assert_eq!(fs::metadata(&file).unwrap().modified().unwrap(), whole);
    let told = told.lock().unwrap();
    assert!(told.len() == 1 && told[0].contains("it cannot be read"), "{told:?}");
}

#[test]
fn what_a_file_claims_to_hold_costs_no_memory() {
    let (dir, told) = (TempDir::new().unwrap(), Arc::default());
    let directory = PrefixDirectory::at(dir.path(), PLENTY);
    let keys = prompt(0..20, &[1]);
    ask(&mut prefixes(0, Some(&directory), &told), &mut cache(KvForm::Shared, DType::F32), &keys);
    let file = files(&dir)[0].clone();
    let mut record = snapshot::record(&file).unwrap();
    fs::remove_file(&file).unwrap();
    // Of the same scope, by its name, and not of exactly these positions.
    let liar = directory.path(&record.scope, &keys[..3]);
    let Some(Stretch::Image { to, .. }) = record.content.last_mut() else { unreachable!() };
    *to += 1_000_000_000_000;
    record.positions += 1_000_000_000_000;
    let heads = record.scope.layout.heads;
    for (what, heads) in [("rows of nothing", 0), ("as many rows", heads)] {
        record.scope.layout.heads = heads;
        let text = serde_json::to_string(&record).unwrap();
        let header = serde_json::json!({ "__metadata__": { "record": text, "sha256": "" } }).to_string();
        fs::write(&liar, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
        assert!(matches!(directory.list().unwrap()[0].state, State::Damaged(_)), "{what}");
        assert!(directory.candidates(&scope_of("v"), &keys, 0, keys.len() - 1).is_empty(), "{what}");
    }
}

#[test]
fn a_snapshot_of_another_model_is_not_found_and_under_a_false_name_refused() {
    let (dir, told) = (TempDir::new().unwrap(), Arc::default());
    let directory = PrefixDirectory::at(dir.path(), PLENTY);
    let keys = prompt(0..20, &[1]);
    let mut one = prefixes(0, Some(&directory), &told);
    ask(&mut one, &mut cache(KvForm::Shared, DType::F32), &keys);
    drop(one);
    let other = scope_of("w");
    let last = keys.len() - 1;
    assert!(directory.candidates(&other, &keys, 0, last).is_empty());
    let foreign = directory.path(&other, &keys[..last]);
    let own = directory.path(&scope_of("v"), &keys[..last]);
    fs::copy(&own, &foreign).unwrap();
    let why = super::directory::open(&foreign, &other).unwrap_err();
    assert_eq!(why.to_string(), "it was read by another model, variant, provider or version");
    // Another prompt's snapshot under the name of this one.
    let wanted = prompt(0..20, &[9]);
    fs::rename(&own, directory.path(&scope_of("v"), &wanted[..last])).unwrap();
    let mut one = prefixes(0, Some(&directory), &told);
    // The text before the image is equal, and used.
    assert_eq!(ask(&mut one, &mut cache(KvForm::Shared, DType::F32), &wanted).disk, 20);
    let told = told.lock().unwrap();
    assert!(told[0].contains("something else than its name says"), "{told:?}");
}

#[test]
fn the_directory_keeps_its_limit_and_leaves_other_files_alone() {
    let (dir, told) = (TempDir::new().unwrap(), Arc::default());
    let plenty = PrefixDirectory::at(dir.path(), PLENTY);
    fs::write(dir.path().join("weights.safetensors"), "mine").unwrap();
    fs::write(dir.path().join(".partial-old"), "half").unwrap();
    let old = SystemTime::now() - Duration::from_mins(10);
    fs::File::options()
        .append(true)
        .open(dir.path().join(".partial-old"))
        .unwrap()
        .set_modified(old)
        .unwrap();
    let mut prefixes = prefixes(0, Some(&plenty), &told);
    let talk = |n: u8| prompt(0..20, &[n]);
    for n in 1..4 {
        ask(&mut prefixes, &mut cache(KvForm::Shared, DType::F32), &talk(n));
        prefixes.finish();
        let path = plenty.path(&prefixes.scope, &talk(n)[..20 + ROWS]);
        let age = SystemTime::now() - Duration::from_secs(100 - u64::from(n));
        fs::File::options().append(true).open(path).unwrap().set_modified(age).unwrap();
    }
    assert!(!dir.path().join(".partial-old").exists(), "left by a killed process");
    let listed = plenty.list().unwrap();
    assert_eq!(listed.len(), 3);
    assert!(listed.iter().all(|one| one.state == State::Whole));
    let content = listed[0].content.as_ref().unwrap();
    assert_eq!((content.positions, content.images, &content.variant[..]), (20 + ROWS, 1, "v"));
    // The first is used, so that the second goes.
    ask(&mut prefixes, &mut cache(KvForm::Shared, DType::F32), &talk(1));
    let pruned = plenty.prune(2 * listed[0].bytes).unwrap();
    assert_eq!((pruned.removed.len(), pruned.freed, pruned.kept), (1, listed[0].bytes, 2 * listed[0].bytes));
    assert!(!plenty.path(&prefixes.scope, &talk(2)[..20 + ROWS]).exists());
    assert_eq!(plenty.prune(0).unwrap().kept, 0);
    assert_eq!(files(&dir), [dir.path().join("weights.safetensors")]);
    // One that is larger than the limit is not written, and that is told once.
    drop(prefixes);
    let small = PrefixDirectory::at(dir.path(), 100);
    let mut prefixes = super::tests::prefixes(0, Some(&small), &told);
    for n in 1..4 {
        assert_eq!(ask(&mut prefixes, &mut cache(KvForm::Shared, DType::F32), &talk(n)).disk, 0);
    }
    drop(prefixes);
    assert_eq!(told.lock().unwrap().len(), 1, "{told:?}");
    assert_eq!(files(&dir).len(), 1);
}

#[test]
fn a_directory_that_cannot_be_written_is_told_of_and_answers_go_on() {
    let (dir, told) = (TempDir::new().unwrap(), Arc::default());
    let file = dir.path().join("file");
    fs::write(&file, "not a directory").unwrap();
    let mut prefixes = prefixes(0, Some(&PrefixDirectory::at(&file, PLENTY)), &told);
    let mut cache = cache(KvForm::Shared, DType::F32);
    for n in 0..3 {
        assert_eq!(ask(&mut prefixes, &mut cache, &prompt(0..20, &[n])).disk, 0);
    }
    let told = told.lock().unwrap();
    assert!(told.len() == 1 && told[0].starts_with("no snapshots are written: "), "{told:?}");
    assert_eq!(prefixes.report().refused.as_ref(), Some(&told[0]));
}

#[test]
fn who_reads_a_prompt_is_waited_for_unless_one_gives_up() {
    let (dir, told) = (TempDir::new().unwrap(), Arc::default());
    let directory = PrefixDirectory::at(dir.path(), PLENTY);
    let keys = prompt(0..20, &[1]);
    let mut one = prefixes(0, Some(&directory), &told);
    let mut cache_of_one = cache(KvForm::Shared, DType::F32);
    let found = one.restore(&mut cache_of_one, &keys, &[], &Canceler::default()).unwrap();
    let mut other = prefixes(0, Some(&directory), &told);
    let canceler = Canceler::default();
    canceler.cancel();
    let mut cache_of_other = cache(KvForm::Shared, DType::F32);
    assert!(matches!(other.restore(&mut cache_of_other, &keys, &[], &canceler), Err(Error::Cancelled)));
    let waiting = thread::spawn({
        let keys = keys.clone();
        move || ask(&mut other, &mut cache_of_other, &keys).disk
    });
    read(&mut cache_of_one, &keys, DType::F32);
    one.write(&cache_of_one, &keys, found);
    assert_eq!(waiting.join().unwrap(), 20 + ROWS);
    // Whoever fails lets the next one read.
    let other_keys = prompt(0..20, &[2]);
    drop(one.restore(&mut cache_of_one, &other_keys, &[], &Canceler::default()).unwrap());
    assert_eq!(ask(&mut one, &mut cache(KvForm::Shared, DType::F32), &other_keys).total(), 0);
}

#[test]
fn another_model_finds_nothing_of_the_one_before() {
    let (dir, told) = (TempDir::new().unwrap(), Arc::default());
    let directory = PrefixDirectory::at(dir.path(), PLENTY);
    let mut prefixes = prefixes(PLENTY, Some(&directory), &told);
    let mut working = cache(KvForm::Shared, DType::F32);
    for n in [1, 2] {
        ask(&mut prefixes, &mut working, &prompt(0..20, &[n]));
    }
    assert!(prefixes.report().memory_used > 0);
    prefixes.replace(scope_of("w"));
    assert_eq!((prefixes.report().memory_used, files(&dir).len()), (0, 0));
    assert_eq!(ask(&mut prefixes, &mut cache(KvForm::Shared, DType::F32), &prompt(0..20, &[1])).total(), 0);
}

#[test]
fn sources_are_given_up_last_found_first() {
    let from = CachedFrom { working: 5, memory: 4, package: 0, disk: 1 };
    assert_eq!(from.at_most(10), from);
    assert_eq!(from.at_most(8), CachedFrom { working: 5, memory: 3, package: 0, disk: 0 });
    assert_eq!(from.at_most(2), CachedFrom { working: 2, ..CachedFrom::default() });
}
