//! A folder for each label, a text file for each row.

use std::fs;
use std::path::Path;

use anyhow::Result;

use super::{Cell, Reader, regular};
use crate::user_error;

impl Reader<'_> {
    pub(super) fn folders(&mut self) -> Result<()> {
        for (label, file) in texts(&self.table.path, self.labelled)? {
            let path = self.table.path.join(&file);
            regular(&path)?;
            let bytes = fs::read(&path).map_err(|e| user_error!("cannot read {}: {e}", path.display()))?;
            let text = std::str::from_utf8(&bytes).map_err(|e| {
                user_error!("{}: invalid UTF-8 at byte {}; convert it to UTF-8", path.display(), e.valid_up_to())
            })?;
            let text = text.trim_start_matches('\u{feff}');
            self.push(0, Cell::Text(text), None, label.as_deref().map(Cell::Text), Some(Cell::Text(&file)))?;
        }
        Ok(())
    }
}

/// The texts of a folder as (label, path in the folder), sorted by name: those in its folders, and,
/// where no labels are asked for, those in itself.
pub(super) fn texts(folder: &Path, labelled: bool) -> Result<Vec<(Option<String>, String)>> {
    let mut found = Vec::new();
    let (folders, files) = entries(folder)?;
    if !labelled {
        found.extend(files.into_iter().map(|file| (None, file)));
    }
    if folders.is_empty() && found.is_empty() {
        return Err(user_error!(
            "{} holds no folders: format \"folders\" needs one for each label, with a .txt file for each row",
            folder.display()
        ));
    }
    for label in folders {
        let (_, files) = entries(&folder.join(&label))?;
        if files.is_empty() {
            return Err(user_error!("{} holds no .txt files", folder.join(&label).display()));
        }
        found.extend(files.into_iter().map(|file| (Some(label.clone()), format!("{label}/{file}"))));
    }
    Ok(found)
}

/// Names of the folders and of the .txt files in a folder, each sorted; hidden ones are left out.
fn entries(folder: &Path) -> Result<(Vec<String>, Vec<String>)> {
    let cannot = |e| user_error!("cannot read {}: {e}", folder.display());
    let (mut folders, mut files) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(folder).map_err(cannot)? {
        let entry = entry.map_err(cannot)?;
        let name = entry
            .file_name()
            .into_string()
            .map_err(|name| user_error!("{}: the name {name:?} is not UTF-8; rename it", folder.display()))?;
        if name.starts_with('.') {
        } else if entry.path().is_dir() {
            folders.push(name);
        } else if name.to_ascii_lowercase().ends_with(".txt") {
            files.push(name);
        }
    }
    folders.sort_unstable();
    files.sort_unstable();
    Ok((folders, files))
}
