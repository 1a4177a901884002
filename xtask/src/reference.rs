//! `cargo xtask reference`: the pages of `docs/reference/`, made from code. What comes from sources alone is compared by
//! `cargo xtask tidy`, too; what programs say themselves (their help, their metrics) by `reference --check`.

mod config;
mod crds;
mod limits;
mod said;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{build, root};

/// A page: its name in `docs/reference/`, and what it says.
type Page = (&'static str, String);

/// Stands above each page.
fn head(title: &str, about: &str) -> String {
    format!("# {title}\n\nMade by `cargo xtask reference`; do not edit. {about}\n")
}

/// Writes all pages, or says which are not as they would be written.
///
/// # Errors
///
/// If the code cannot be understood, or the programs do not run.
pub(crate) fn run(check: bool, bins: Option<PathBuf>) -> Result<bool> {
    // What needs no program comes first, so that it is there whatever becomes of the rest.
    let ask = |page: fn(&Path) -> Result<Page>| {
        let bins = bins.clone().map_or_else(|| build(false), Ok)?;
        Ok(vec![page(&bins)?])
    };
    let makers: [&dyn Fn() -> Result<Vec<Page>>; 3] = [
        &from_sources,
        &|| ask(|bins| Ok(("cli.md", said::cli(bins)?))),
        &|| ask(|bins| Ok(("metrics.md", said::metrics(bins)?))),
    ];
    let mut fresh = true;
    for pages in makers {
        let pages = pages()?;
        if check {
            let stale = stale(&pages);
            stale.iter().for_each(|problem| println!("{problem}"));
            fresh &= stale.is_empty();
        } else {
            write(pages)?;
        }
    }
    Ok(fresh)
}

fn write(pages: Vec<Page>) -> Result<()> {
    fs::create_dir_all(root().join("docs/reference"))?;
    for (name, text) in pages {
        fs::write(path(name), text).with_context(|| format!("write {name}"))?;
        println!("docs/reference/{name}");
    }
    Ok(())
}

/// A sentence for each page from sources that is not what they say.
pub(crate) fn stale_sources() -> Vec<String> {
    match from_sources() {
        Ok(pages) => stale(&pages),
        Err(error) => vec![format!("docs/reference: {error:#}")],
    }
}

fn from_sources() -> Result<Vec<Page>> {
    Ok(vec![
        ("config.md", config::page()?),
        ("crds.md", crds::page()?),
        ("limits.md", limits::page()?),
    ])
}

fn stale(pages: &[Page]) -> Vec<String> {
    let old = pages
        .iter()
        .filter(|(name, text)| fs::read_to_string(path(name)).ok().as_ref() != Some(text));
    old.map(|(name, _)| {
        format!("docs/reference/{name}: is not what the code says: `cargo xtask reference`")
    })
    .collect()
}

fn path(name: &str) -> PathBuf {
    root().join("docs/reference").join(name)
}

/// A row of a table; what would end a cell is escaped.
fn row<const N: usize>(cells: [&str; N]) -> String {
    let cells = cells.map(|cell| {
        cell.split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
            .replace('|', "\\|")
    });
    format!("| {} |\n", cells.join(" | "))
}

fn header<const N: usize>(cells: [&str; N]) -> String {
    row(cells) + &format!("|{}\n", "---|".repeat(N))
}

/// The words of the comments that stand right above a line of rustfmt's.
#[derive(Debug, Default)]
struct Above {
    comment: Vec<String>,
    attributes: String,
}

impl Above {
    /// Takes a line that belongs to what follows; says whether it was one.
    fn takes(&mut self, line: &str) -> bool {
        if let Some(comment) = line.strip_prefix("///") {
            self.comment.push(comment.trim().to_owned());
        } else if line.starts_with("#[") || self.is_open() {
            self.attributes += line;
        } else {
            return false;
        }
        true
    }

    /// An attribute goes over several lines.
    fn is_open(&self) -> bool {
        self.attributes.matches('[').count() > self.attributes.matches(']').count()
    }

    fn text(&self) -> String {
        // A heading (`# Errors`) begins what is for developers.
        let words = self
            .comment
            .iter()
            .take_while(|line| !line.starts_with('#'));
        plain(&words.cloned().collect::<Vec<_>>().join(" "))
    }
}

/// Without the brackets of links to code.
fn plain(text: &str) -> String {
    text.replace("[`", "`").replace("`]", "`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_do_not_end_early_and_lines_become_one() {
        assert_eq!(row(["a|b", "c\n  d"]), "| a\\|b | c d |\n");
        assert_eq!(header(["x", "y"]), "| x | y |\n|---|---|\n");
    }

    #[test]
    fn comments_end_where_they_are_for_developers() {
        let mut above = Above::default();
        for line in [
            "/// What [`A`] is.",
            "///",
            "/// # Errors",
            "/// None.",
            "#[serde(",
            "default)]",
        ] {
            assert!(above.takes(line), "{line}");
        }
        assert!(!above.takes("name: String,"));
        assert_eq!(above.text(), "What `A` is. ");
        assert_eq!(above.attributes, "#[serde(default)]");
    }
}
