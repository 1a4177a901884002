//! Links between the pages of `docs/`, and their anchors.

use std::{collections::BTreeSet, fs, path::Path};

use crate::root;

/// A sentence for each link of a page that leads nowhere.
pub(crate) fn broken() -> Vec<String> {
    let docs = root().join("docs");
    let mut pages = vec![root().join("README.md"), root().join("ARCHITECTURE.md")];
    let mut folders = vec![docs];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                pages.push(path);
            }
        }
    }
    pages.sort();
    pages.iter().flat_map(|page| broken_in(page)).collect()
}

fn broken_in(page: &Path) -> Vec<String> {
    let text = fs::read_to_string(page).unwrap_or_default();
    let folder = page.parent().unwrap_or(page);
    let bad = links(&text).into_iter().filter(|link| {
        let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
        let target = if file.is_empty() {
            page.to_owned()
        } else {
            folder.join(file)
        };
        !target.exists() || !(anchor.is_empty() || has(&target, anchor))
    });
    let shown = page.strip_prefix(root()).unwrap_or(page).display();
    bad.map(|link| format!("{shown}: {link} leads nowhere"))
        .collect()
}

fn has(page: &Path, anchor: &str) -> bool {
    let text = fs::read_to_string(page).unwrap_or_default();
    anchors(&text).contains(anchor)
}

/// What stands in `](…)`, but for the rest of the world.
fn links(text: &str) -> Vec<&str> {
    let targets = text
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next());
    let here = targets.filter(|target| !target.contains("://") && !target.contains(' '));
    here.collect()
}

/// As GitHub names headings.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let name = |heading: &str| {
        let heading = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = heading
            .chars()
            .filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_anchors_are_read_as_they_are_shown() {
        let text =
            "# Who, and `how`: it's so\n[a](b.md#c) ![d](e.png) [f](https://x/y) `](no link)`";
        assert_eq!(links(text), ["b.md#c", "e.png"]);
        assert_eq!(
            anchors(text),
            BTreeSet::from(["who-and-how-its-so".to_owned()])
        );
    }

    #[test]
    fn what_leads_nowhere_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let page = folder.path().join("a.md");
        fs::write(
            &page,
            "# Here\n[1](#here) [2](#there) [3](b.md) [4](a.md#here)",
        )
        .unwrap();
        let told = broken_in(&page);
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].ends_with("#there leads nowhere"), "{told:?}");
    }
}
