//! Lines on standard error beside the log, in the form of the log.

use std::{
    fmt::Display,
    io::{self, Write as _},
};

use clap::ValueEnum;
use serde_json::json;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};

/// What a line of the log looks like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    /// For people
    #[default]
    Text,
    /// A JSON object
    Json,
}

impl LogFormat {
    /// Says what the user should know, whatever is logged.
    pub(super) fn say(self, text: impl Display) {
        self.write("INFO", &text.to_string());
    }

    /// Says what went wrong; people see it behind `error: `.
    pub(super) fn fail(self, text: &str) {
        match self {
            Self::Text => self.write("ERROR", &format!("error: {text}")),
            Self::Json => self.write("ERROR", text),
        }
    }

    fn write(self, level: &str, text: &str) {
        let line = match self {
            Self::Text => text.to_owned(),
            Self::Json => object(level, text),
        };
        // Standard error may be closed; there is nowhere else to say so.
        let _ = writeln!(io::stderr(), "{line}");
    }
}

/// The object that the log would write.
fn object(level: &str, text: &str) -> String {
    let mut time = String::new();
    // A `String` takes everything.
    let _ = SystemTime.format_time(&mut Writer::new(&mut time));
    json!({"timestamp": time, "level": level, "message": text, "target": "llava_phi"}).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_holds_any_text_on_one_line() {
        let line = object("INFO", "a \"b\"\nc");
        assert!(!line.contains('\n'), "{line}");
        let told: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&told["message"], &told["level"]), (&json!("a \"b\"\nc"), &json!("INFO")));
        assert!(told["timestamp"].as_str().unwrap().ends_with('Z'), "{line}");
    }
}
