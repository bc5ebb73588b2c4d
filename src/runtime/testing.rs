//! ONNX Runtime for unit tests: found as the program finds it.

use std::path::PathBuf;

use super::{LibraryOptions, Runtime};

/// Starts ONNX Runtime, or fails the test with the reason.
pub(crate) fn start() -> &'static Runtime {
    let value = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let options = LibraryOptions {
        environment: value("ORT_DYLIB_PATH"),
        python_environment: value("VIRTUAL_ENV"),
        ..LibraryOptions::default()
    };
    Runtime::start(&options, &mut |_| {}).expect("the tests run graphs")
}
