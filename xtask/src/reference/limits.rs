//! `limits.md`: every named limit of the product, with its comment.

use std::{collections::BTreeMap, fmt::Write as _};

use anyhow::{Context as _, Result, ensure};

use super::{Above, head, header, plain, row};
use crate::{root, tidy};

/// What is only for tests, benches and developers.
const NOT_PRODUCT: [&str; 6] = [
    "/tests",
    "/examples/",
    "/benches/",
    "/build.rs",
    "-bench/",
    "/bin/",
];

/// Folders whose limits are somebody's who runs the product.
const PRODUCT: [&str; 14] = [
    "cni/",
    "controller/",
    "dns/",
    "ebpf/",
    "mesh-agent/",
    "mesh-api/",
    "mesh-core/",
    "mesh-daemon/",
    "mesh-identity/",
    "mesh-linux/",
    "mesh-tunnel/",
    "mesh-wire/",
    "mesh-wireguard/",
    "relay/",
];

pub(super) fn page() -> Result<String> {
    let mut folders: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (path, text) in tidy::sources(root()) {
        let of_product = PRODUCT.iter().any(|folder| path.starts_with(folder));
        if !of_product || NOT_PRODUCT.iter().any(|part| path.contains(part)) {
            continue;
        }
        for (name, value, comment) in limits(&text) {
            let (folder, file) = path.split_once('/').context("a source in the root")?;
            let place = format!("{}: `{name}`", file.trim_start_matches("src/"));
            let line = row([&place, &format!("`{value}`"), &comment]);
            folders.entry(folder.to_owned()).or_default().push(line);
        }
    }
    ensure!(folders.len() > PRODUCT.len() / 2, "no limits are found");
    let about = "The ones that an operator meets, and what happens there: [limits](../limits.md). This list has every constant \
                 of the code whose name says that it is a maximum or a limit, as the code writes it.";
    let mut page = head("Named limits", about);
    for (folder, rows) in folders {
        write!(
            page,
            "\n## {folder}\n\n{}",
            header(["where", "value", "what it bounds, and why so much"])
        )?;
        rows.iter().for_each(|row| page += row);
    }
    Ok(page)
}

/// Name, value and comment of each limit before a file's tests.
fn limits(text: &str) -> Vec<(String, String, String)> {
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    let mut found = Vec::new();
    let mut above = Above::default();
    let mut lines = text.lines().map(str::trim);
    while let Some(line) = lines.next() {
        if above.takes(line) {
            continue;
        }
        let comment = std::mem::take(&mut above);
        let Some(name) = limit(line) else { continue };
        let mut whole = line.to_owned();
        while !whole.ends_with(';') {
            let Some(more) = lines.next() else { break };
            whole = format!("{whole} {more}");
        }
        if let Some((_, value)) = whole.split_once(" = ") {
            let value = value.trim_end_matches(';');
            found.push((name.to_owned(), plain(value), comment.text()));
        }
    }
    found
}

/// The name of a constant that is one; those of eBPF maps are lines of a macro (`NAME = VALUE;`).
fn limit(line: &str) -> Option<&str> {
    let name = match line.split_once("const ") {
        Some((before, after)) if before.is_empty() || before.starts_with("pub") => {
            after.split_once(':')?.0
        }
        Some(_) => return None,
        None => line.split_once(" = ")?.0,
    };
    let is_constant = name
        .chars()
        .all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_');
    let says_so = name.split('_').any(|word| ["MAX", "LIMIT"].contains(&word));
    (is_constant && says_so).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_found_with_its_value_and_comment() {
        let text = "/// Most of [`It`]:\n/// two.\npub(crate) const IT_MAX: usize =\n    2;\nconst OTHER: u8 = 1;\nfn f() {\n    \
                    const X_MAX: u8 = 3;\n}\n#[cfg(test)]\nconst T_MAX: u8 = 1;";
        let one = |name: &str, value: &str, comment: &str| {
            (name.to_owned(), value.to_owned(), comment.to_owned())
        };
        let expected = [
            one("IT_MAX", "2", "Most of `It`: two."),
            one("X_MAX", "3", ""),
        ];
        assert_eq!(limits(text), expected);
        assert_eq!(limit("let x = \"const A_MAX: 1\";"), None);
        assert_eq!(limit("ENTRIES_MAX = 7;"), Some("ENTRIES_MAX"));
    }
}
