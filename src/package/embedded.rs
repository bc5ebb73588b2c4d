//! The miniature model, compiled into the program.

use include_dir::{Dir, include_dir};

static TINY: Dir<'static> = include_dir!("$CARGO_MANIFEST_DIR/models/tiny/package");

/// Files that are part of the program, by relative path.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddedFiles(&'static Dir<'static>);

impl EmbeddedFiles {
    /// The miniature LLaVA-Phi of `models/tiny`.
    pub fn tiny() -> Self {
        Self(&TINY)
    }

    /// The content of the file with the relative path `name`.
    pub fn get(self, name: &str) -> Option<&'static [u8]> {
        self.0.get_file(name).map(include_dir::File::contents)
    }
}
