//! `kiln man`: the manual, made from the command line itself.

use std::process::ExitCode;

use anyhow::Result;
use clap::CommandFactory as _;
use clap_mangen::Man;

use super::{print, print_json};
use crate::cli::{self, Cli, Options};
use crate::{store, user_error};

/// Prints the page of kiln itself, or writes that and a page for each command into a folder, and prints
/// their paths.
///
/// # Errors
/// The user's, who asks for a page as JSON; the files cannot be written.
pub fn run(args: &cli::Man, options: &Options) -> Result<ExitCode> {
    let mut kiln = Cli::command();
    kiln.build();
    let Some(dir) = &args.output else {
        if options.json {
            return Err(user_error!(
                "kiln man prints a page, which is no JSON: leave --json out, or give --output DIR"
            ));
        }
        print(&page(&Man::new(kiln))?)?;
        return Ok(ExitCode::SUCCESS);
    };
    let commands = kiln.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    let mut paths = Vec::new();
    for man in std::iter::once(kiln.clone()).chain(commands).map(Man::new) {
        let path = dir.join(man.get_filename());
        store::write_bytes(&path, page(&man)?.as_bytes())?;
        paths.push(path);
    }
    if options.json {
        print_json(&paths)?;
    } else {
        paths.iter().try_for_each(|path| print(&path.display().to_string()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn page(man: &Man) -> Result<String> {
    let mut page = Vec::new();
    man.render(&mut page)?;
    Ok(String::from_utf8(page)?)
}
