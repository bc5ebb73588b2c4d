//! Parse, run, print, exit.

#![allow(unsafe_code)] // Setting a variable is unsafe where another thread may read it; see `main`.

use std::{env, process::ExitCode};

/// Official builds of ONNX Runtime report that they were started, unless this says otherwise.
const TELEMETRY: &str = "ORT_DISABLE_TELEMETRY";

fn main() -> ExitCode {
    if env::var_os(TELEMETRY).is_none() {
        // SAFETY: this is the only thread so far.
        unsafe { env::set_var(TELEMETRY, "1") };
    }
    llava_phi::cli::main()
}
