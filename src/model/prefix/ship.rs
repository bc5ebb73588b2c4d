//! The head of every prompt as a snapshot in the package.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use super::super::kv_cache::KvCache;
use super::scope::Scope;
use super::snapshot::{self, Record, Snapshot, Unusable};
use super::{Prefixes, tell};
use crate::disk::{hex, sync_dir};
use crate::error::{Error, Result};
use crate::package::manifest::{FileInfo, SnapshotSpec};
use crate::package::{FileSource, MANIFEST, ModelPackage};

use sha2::{Digest as _, Sha256};

const DECODER: &str = "decoder";

impl Prefixes {
    /// Takes up what `package` has for the decoder that serves. What cannot be used is told of.
    pub(in super::super) fn open_shipped(&mut self, package: &ModelPackage) {
        let variant = self.scope.variant(DECODER);
        let own = package.manifest().snapshots.iter().find(|snapshot| snapshot.variant == variant);
        self.shipped = own.and_then(|spec| match open(package, spec, &self.scope) {
            Ok(snapshot) => Some(snapshot),
            Err(why) => {
                let file = package.display_path(&spec.file);
                let text = format!("snapshot {} of the package is not used: {why}", file.display());
                tell(self.notices.as_ref(), text);
                None
            }
        });
    }

    /// Adds what `cache` holds to `package`, in the place of what was there for this decoder.
    pub(in super::super) fn ship(&self, package: &ModelPackage, cache: &KvCache) -> Result<SnapshotSpec> {
        let Some(root) = package.directory() else {
            let text = "the model inside this program cannot be changed; name a package with --model";
            return Err(Error::Request(text.to_owned()));
        };
        let variant = self.scope.variant(DECODER).to_owned();
        // No time in it: the same package gives the same file.
        let record = Record::new(&self.name, &self.scope, cache.positions(), 0);
        let data = cache.export(&(0..cache.len()))?;
        let failed = |e| Error::package(root, "the snapshot cannot be written").because(e);
        let directory = root.join(&variant);
        fs::create_dir_all(&directory).map_err(failed)?;
        let written = tempfile::NamedTempFile::new_in(&directory).map_err(failed)?;
        snapshot::write(written.as_file(), &record, &data).map_err(failed)?;
        drop(data);
        let bytes = fs::read(written.path()).map_err(failed)?;
        let sha256 = hex(&Sha256::digest(&bytes));
        // Another name for another content: until the manifest is written the package is as it was.
        let spec = SnapshotSpec {
            file: format!("{variant}/head-{}.safetensors", &sha256[..8]),
            variant,
            positions: cache.len(),
        };
        publish(written, &root.join(&spec.file)).map_err(failed)?;

        let mut manifest = package.manifest().clone();
        let (replaced, kept) =
            manifest.snapshots.into_iter().partition::<Vec<_>, _>(|other| other.variant == spec.variant);
        manifest.snapshots = kept;
        manifest.snapshots.push(spec.clone());
        for old in &replaced {
            manifest.files.remove(&old.file);
        }
        manifest.files.insert(spec.file.clone(), FileInfo { bytes: bytes.len() as u64, sha256 });
        let mut text = tempfile::NamedTempFile::new_in(root).map_err(failed)?;
        let json = serde_json::to_vec_pretty(&manifest).map_err(|e| failed(e.into()))?;
        text.write_all(&json).and_then(|()| text.as_file().sync_all()).map_err(failed)?;
        publish(text, &root.join(MANIFEST)).map_err(failed)?;
        for old in replaced.iter().filter(|old| old.file != spec.file) {
            // Nothing names it any more.
            let _ = fs::remove_file(root.join(&old.file));
        }
        Ok(spec)
    }
}

/// Moves a file to its place, readable as other files of a package are.
fn publish(file: tempfile::NamedTempFile, path: &Path) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        file.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
    }
    file.persist(path).map_err(|e| e.error)?;
    path.parent().map_or(Ok(()), sync_dir)
}

/// The snapshot that `spec` names, proved whole. The processor and the runtime that made it may be others, as for every
/// golden: a package goes to other machines.
fn open(package: &ModelPackage, spec: &SnapshotSpec, scope: &Scope) -> Result<Snapshot, Unusable> {
    let serves = |other: &Scope| {
        let decoder = |scope: &Scope| scope.components.iter().find(|one| one.component == DECODER).cloned();
        other.package == scope.package && other.layout == scope.layout && decoder(other) == decoder(scope)
    };
    let snapshot = match package.file(&spec.file).map_err(|e| e.to_string())? {
        FileSource::Path(path) => Snapshot::open(&path, serves)?,
        FileSource::Memory(bytes) => Snapshot::of(bytes, serves)?,
    };
    if snapshot.keys.len() != spec.positions {
        let (found, wanted) = (snapshot.keys.len(), spec.positions);
        return Err(format!("it holds {found} positions, the manifest says {wanted}").into());
    }
    Ok(snapshot)
}
