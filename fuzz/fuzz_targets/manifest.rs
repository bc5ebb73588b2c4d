//! Whatever a manifest holds, it is read or refused; what is read survives being written.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use llava_phi::package::read_manifest;

fuzz_target!(|bytes: &[u8]| {
    let path = Path::new("manifest.json");
    if let Ok(manifest) = read_manifest(path, bytes) {
        let written = serde_json::to_vec(&manifest).expect("a manifest has a JSON form");
        assert_eq!(read_manifest(path, &written).expect("what was read can be read again"), manifest);
    }
});
