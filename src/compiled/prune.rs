//! What lies in the cache, and what is removed from it first.

use std::fs;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use serde::Serialize;

use super::entry::{self, Key, RECORD};
use super::{CompiledCache, PARTIAL, USED};
use crate::disk::{remove_all, seconds, write_failed};
use crate::error::Result;

/// One directory of the cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// The digest of its key.
    pub digest: String,
    /// What it is.
    pub state: State,
    /// What it was compiled from, where a record says it.
    pub key: Option<Key>,
    /// When it was built, in seconds since 1970; 0 where no record says it.
    pub created: u64,
    /// When it was used last, in seconds since 1970.
    pub last_used: u64,
    /// Bytes on disk.
    pub bytes: u64,
    #[serde(skip)]
    order: SystemTime,
}

/// What a directory of the cache is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// A complete entry that nobody uses now.
    Whole,
    /// A complete entry that a process uses.
    InUse,
    /// A process is building it, or removing it.
    Building,
    /// A process left it half built.
    Abandoned,
    /// Its record cannot be used; the text says why.
    Damaged(String),
}

/// What a pruning removed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Pruned {
    /// What was removed, in this order.
    pub removed: Vec<Listed>,
    /// Bytes that were freed.
    pub freed: u64,
    /// Bytes that are left.
    pub kept: u64,
}

impl CompiledCache {
    /// Everything in the cache, what was used last first; nothing when there is no such directory. Files are not hashed; [`CompiledCache::find`] does that.
    ///
    /// # Errors
    /// [`Error::Cache`](crate::error::Error::Cache) when the directory cannot be read.
    pub fn list(&self) -> Result<Vec<Listed>> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(write_failed(&self.root, e)),
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut listed = Vec::new();
        for name in names {
            let digest = name.strip_prefix(PARTIAL).unwrap_or(&name);
            if digest.len() == 32 && digest.bytes().all(|b| b.is_ascii_hexdigit()) {
                listed.extend(self.look(&name, digest)?);
            }
        }
        listed.sort_by(|a, b| b.order.cmp(&a.order).then_with(|| a.digest.cmp(&b.digest)));
        Ok(listed)
    }

    /// Removes what killed processes left and what is damaged, then entries until at most `limit` bytes are left,
    /// those first that were used longest ago. What a process builds or uses stays.
    ///
    /// # Errors
    /// [`Error::Cache`](crate::error::Error::Cache) when something cannot be read or removed.
    pub fn prune(&self, limit: u64) -> Result<Pruned> {
        self.remove_copies();
        let listed = self.list()?;
        let mut pruned = Pruned { kept: listed.iter().map(|one| one.bytes).sum(), ..Pruned::default() };
        // The list has the last used first; among what is gone through backwards, broken ones come first.
        let broken = |one: &&Listed| matches!(one.state, State::Abandoned | State::Damaged(_));
        let first = listed.iter().filter(broken);
        let then = listed.iter().rev().filter(|one| one.state == State::Whole);
        for one in first.chain(then) {
            if one.state == State::Whole && pruned.kept <= limit {
                break;
            }
            let Some(_alone) = self.try_alone(&one.digest)? else { continue };
            let removed = if one.state == State::Abandoned {
                // Nobody builds while the lock is held here; an entry that was finished since stays.
                remove_all(&self.root.join(format!("{PARTIAL}{}", one.digest)))
            } else {
                self.remove(&one.digest)
            };
            removed.map_err(|e| write_failed(&self.root.join(&one.digest), e))?;
            pruned.kept -= one.bytes;
            pruned.freed += one.bytes;
            pruned.removed.push(one.clone());
        }
        Ok(pruned)
    }

    /// What the directory `name` is; `None` when it went away meanwhile.
    fn look(&self, name: &str, digest: &str) -> Result<Option<Listed>> {
        let dir = self.root.join(name);
        let partial = name.starts_with(PARTIAL);
        let record = entry::record(&dir);
        // Who asks for the lock alone and gets it knows that nobody uses the entry; who gets it shared, that nobody
        // builds it. A cache that cannot be written has neither builders nor locks.
        // The first lock must be gone before the second is asked for.
        let alone = !self.writable || self.try_alone(digest)?.is_some();
        let shared = !self.writable || self.share(digest)?.is_some();
        let state = match &record {
            _ if !shared => State::Building,
            _ if partial => State::Abandoned,
            _ if !alone => State::InUse,
            Ok(_) => State::Whole,
            Err(why) => State::Damaged(why.clone()),
        };
        let record = record.ok();
        let changed =
            [USED, RECORD, ""].iter().find_map(|file| dir.join(file).metadata().ok()?.modified().ok());
        let Some(order) = changed else { return Ok(None) };
        Ok(Some(Listed {
            digest: digest.to_owned(),
            state,
            created: record.as_ref().map_or(0, |record| record.created),
            key: record.map(|record| record.key),
            last_used: seconds(order),
            bytes: size_of(&dir),
            order,
        }))
    }
}

/// Bytes of all files below a directory; what goes away meanwhile does not count.
fn size_of(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => size_of(&entry.path()),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    });
    sizes.fold(0, u64::saturating_add)
}
