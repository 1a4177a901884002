//! The rules that no compiler knows: who may import whom, where `unsafe` may be, what every folder
//! and every crate root has.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::{cargo, links, reference, report, root};

/// Package, and what it may import inside the workspace. Tests of a package (dev-dependencies) may
/// also use what stands above it here.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("mesh-wire", &[]),
    ("mesh-linux", &[]),
    ("mesh-core", &["mesh-wire"]),
    ("mesh-identity", &["mesh-wire"]),
    ("mesh-daemon", &[]),
    ("mesh-api", &["mesh-core", "mesh-wire", "mesh-identity"]),
    ("mesh-wireguard", &[]),
    (
        "mesh-tunnel",
        &["mesh-wire", "mesh-linux", "mesh-wireguard"],
    ),
    ("ebpf-abi", &[]),
    ("ebpf-programs", &["ebpf-abi"]),
    ("ebpf-loader", &["ebpf-abi", "ebpf-programs"]),
    ("mesh-dns", &["mesh-core", "mesh-wire"]),
    (
        "mesh-relay",
        &["mesh-core", "mesh-wire", "mesh-identity", "mesh-daemon"],
    ),
    (
        "mesh-controller",
        &[
            "mesh-api",
            "mesh-core",
            "mesh-wire",
            "mesh-identity",
            "mesh-daemon",
        ],
    ),
    (
        "mesh-agent",
        &[
            "mesh-wire",
            "mesh-linux",
            "mesh-core",
            "mesh-identity",
            "mesh-daemon",
            "mesh-api",
            "mesh-tunnel",
            "ebpf-abi",
            "ebpf-loader",
            "mesh-dns",
            "mesh-relay",
        ],
    ),
    ("mesh-cni", &["mesh-api", "mesh-linux", "ebpf-loader"]),
    ("meshctl", &["mesh-api"]),
    (
        "services-bench",
        &[
            "mesh-wire",
            "mesh-core",
            "mesh-linux",
            "ebpf-loader",
            "mesh-agent",
        ],
    ),
    ("netns-tests", &["mesh-linux"]),
    (
        "integration",
        &["mesh-api", "mesh-identity", "mesh-linux", "mesh-wire"],
    ),
    (
        "controlplane-bench",
        &[
            "mesh-wire",
            "mesh-identity",
            "mesh-api",
            "ebpf-abi",
            "integration",
        ],
    ),
    ("xtask", &["netns-tests"]),
];

/// Where `unsafe` may stand: the adapters, the loader, and the lab's two system calls.
const UNSAFE_HOMES: &[&str] = &["mesh-linux/", "ebpf/", "netns-tests/src/sys.rs"];

/// No file of code fits in a head beyond this.
const FILE_LINES_MAX: usize = 1_000;

/// A rule's name, and a sentence for each place that breaks it.
pub(crate) type Outcome = (&'static str, Vec<String>);

/// Runs every rule and prints the table.
///
/// # Errors
///
/// Never: a rule that cannot be checked is broken.
pub(crate) fn run() -> Result<bool> {
    let outcomes = check_all();
    for problem in outcomes.iter().flat_map(|(_, problems)| problems) {
        println!("{problem}");
    }
    let rows = outcomes
        .iter()
        .map(|(rule, problems)| vec![(*rule).to_owned(), problems.len().to_string()]);
    println!(
        "{}",
        report::table(&["rule", "broken"], &rows.collect::<Vec<_>>())
    );
    Ok(outcomes.iter().all(|(_, problems)| problems.is_empty()))
}

/// Every rule's outcome for this workspace.
pub(crate) fn check_all() -> Vec<Outcome> {
    let packages = packages().unwrap_or_default();
    let sources = sources(root());
    let of = |check: fn(&str, &str) -> Vec<String>| {
        sources
            .iter()
            .flat_map(|(path, text)| check(path, text))
            .collect::<Vec<_>>()
    };
    let mut found = vec![];
    if packages.len() < MAY_IMPORT.len() || sources.len() < packages.len() {
        found.push("cargo metadata or the folders cannot be read".to_owned());
    }
    vec![
        ("the workspace is readable", found),
        (
            "imports go downwards",
            packages.iter().flat_map(imports).collect(),
        ),
        (
            "a README in every folder",
            packages
                .iter()
                .filter_map(readme)
                .chain(other_readmes())
                .collect(),
        ),
        (
            "an invariant in every crate root",
            packages.iter().flat_map(invariants).collect(),
        ),
        (
            "every dependency is used",
            packages
                .iter()
                .flat_map(|package| unused(package, &sources))
                .collect(),
        ),
        ("unsafe stays at home", of(unsafe_code)),
        ("nothing is left to do", of(left_to_do)),
        ("files fit in the head", of(length)),
        ("scenarios end well", of(unjudged)),
        ("examples are manifests", examples(&root().join("examples"))),
        (
            "the reference is what the code says",
            reference::stale_sources(),
        ),
        ("links lead somewhere", links::broken()),
    ]
}

#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    manifest_path: PathBuf,
    dependencies: Vec<Dependency>,
    targets: Vec<Target>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    name: String,
    /// Only local packages have one.
    path: Option<PathBuf>,
    /// `None`, `dev` or `build`.
    kind: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Target {
    kind: Vec<String>,
    src_path: PathBuf,
}

fn packages() -> Result<Vec<Package>> {
    let output = cargo(&["metadata", "--no-deps", "--format-version", "1"]).output()?;
    let metadata: Metadata = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    Ok(metadata.packages)
}

fn imports(package: &Package) -> Vec<String> {
    let local = package
        .dependencies
        .iter()
        .filter(|dependency| dependency.path.is_some());
    local
        .filter_map(|dependency| {
            import(&package.name, &dependency.name, dependency.kind.as_deref())
        })
        .collect()
}

fn import(from: &str, to: &str, kind: Option<&str>) -> Option<String> {
    let place = |name: &str| MAY_IMPORT.iter().position(|(package, _)| *package == name);
    let Some((_, allowed)) = MAY_IMPORT.iter().find(|(package, _)| *package == from) else {
        return Some(format!(
            "{from} is not in xtask's table of imports: say there what it may use"
        ));
    };
    let fine = allowed.contains(&to) || (kind == Some("dev") && place(to) < place(from));
    let list = if allowed.is_empty() {
        "nothing".to_owned()
    } else {
        allowed.join(", ")
    };
    (!fine).then(|| {
        format!(
            "{from} may not import {to}: it may use {list}, so that a change stays where it is made; \
             see ARCHITECTURE.md"
        )
    })
}

/// Crates that are used without being named in code: their derive or generated code names them.
const USED_UNNAMED: &[&str] = &["k8s-openapi", "tonic-prost"];

/// Dependencies of `package` that none of its sources names.
fn unused(package: &Package, sources: &[(String, String)]) -> Vec<String> {
    let folder = package.manifest_path.parent().map(show).unwrap_or_default();
    let own: Vec<_> = sources
        .iter()
        .filter(|(path, _)| path.starts_with(&format!("{folder}/")))
        .map(|(_, text)| text.as_str())
        .collect();
    let idle = package.dependencies.iter().filter(|dependency| {
        !USED_UNNAMED.contains(&dependency.name.as_str()) && !names(&own, &dependency.name)
    });
    idle.map(|dependency| {
        format!(
            "{folder}: nothing uses {}: take it out of Cargo.toml",
            dependency.name
        )
    })
    .collect()
}

fn names(sources: &[&str], dependency: &str) -> bool {
    let name = dependency.replace('-', "_");
    let word = |c: char| c.is_alphanumeric() || c == '_';
    sources.iter().any(|text| {
        text.match_indices(&name).any(|(at, _)| {
            let before = text.get(..at).and_then(|head| head.chars().next_back());
            let after = text
                .get(at + name.len()..)
                .and_then(|tail| tail.chars().next());
            !before.is_some_and(word) && !after.is_some_and(word)
        })
    })
}

fn readme(package: &Package) -> Option<String> {
    missing_readme(package.manifest_path.parent()?)
}

fn other_readmes() -> impl Iterator<Item = String> {
    [
        "",
        "cni",
        "deploy",
        "docs",
        "ebpf",
        "examples",
        "integration",
    ]
    .iter()
    .filter_map(|folder| missing_readme(&root().join(folder)))
}

fn missing_readme(folder: &Path) -> Option<String> {
    let missing = !folder.join("README.md").is_file();
    missing.then(|| {
        format!(
            "{}: no README.md: one screen on what it is, how to run, how to test",
            show(folder)
        )
    })
}

fn invariants(package: &Package) -> Vec<String> {
    let roots = package.targets.iter().filter(|target| {
        target
            .kind
            .iter()
            .any(|kind| kind == "lib" || kind == "bin")
    });
    let missing = roots.filter_map(|target| {
        let text = fs::read_to_string(&target.src_path).unwrap_or_default();
        no_invariant(&text).then(|| {
            format!(
                "{}: the crate's own documentation has no **Invariant:** line",
                show(&target.src_path)
            )
        })
    });
    missing.collect()
}

fn no_invariant(text: &str) -> bool {
    !text
        .lines()
        .any(|line| line.starts_with("//!") && line.contains("**Invariant"))
}

fn unsafe_code(path: &str, text: &str) -> Vec<String> {
    if UNSAFE_HOMES.iter().any(|home| path.starts_with(home)) {
        return Vec::new();
    }
    let words =
        ["{", "fn ", "impl ", "extern "].map(|next| format!("{} {next}", concat!("uns", "afe")));
    let words = words.each_ref().map(String::as_str);
    on_lines(
        path,
        text,
        &words,
        "belongs into mesh-linux or ebpf/, behind a safe function",
    )
}

fn left_to_do(path: &str, text: &str) -> Vec<String> {
    // Written in halves, or this file would break its own rule.
    let words = [
        concat!("to", "do!("),
        concat!("unimple", "mented!("),
        concat!("#[ig", "nore"),
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
    ];
    on_lines(path, text, &words, "finish it, or open an issue")
}

fn on_lines(path: &str, text: &str, words: &[&str], why: &str) -> Vec<String> {
    let is_comment = |line: &str| line.trim_start().starts_with("//");
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let own_word = |word: &&&str| {
            word.starts_with(concat!("TO", "D")) || word.starts_with(concat!("FIX", "M"))
        };
        let hit = words
            .iter()
            .find(|word| line.contains(**word) && (own_word(word) || !is_comment(line)));
        if let Some(word) = hit {
            found.push(format!("{path}:{}: `{word}`: {why}", index + 1));
        }
    }
    found
}

fn length(path: &str, text: &str) -> Vec<String> {
    let lines = text.lines().count();
    let long = lines > FILE_LINES_MAX;
    long.then(|| {
        format!("{path}: {lines} lines, more than {FILE_LINES_MAX}: split it by what it decides")
    })
    .into_iter()
    .collect()
}

/// Tests that make a mesh and do not ask at their end whether a daemon complained: it would be overlooked.
fn unjudged(path: &str, text: &str) -> Vec<String> {
    if !path.starts_with("netns-tests/tests/") {
        return Vec::new();
    }
    let tests = text.split("#[test]\n").skip(1);
    let tests = tests.filter_map(|rest| rest.split("\n}\n").next());
    let makes = |body: &str| body.contains("let mesh = ") || body.contains("let mut mesh = ");
    let unjudged = tests.filter(|body| makes(body) && !body.contains(".ends_well()"));
    let names = unjudged.filter_map(|body| body.lines().next());
    let problem = |name| format!("{path}: `{name}`: end it by `mesh.ends_well()`");
    names.map(problem).collect()
}

/// Every Rust file of the workspace, by its path from the root.
pub(crate) fn sources(root: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            let name = entry.file_name();
            if path.is_dir() && name != "target" && !name.to_string_lossy().starts_with('.') {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let relative = path
                    .strip_prefix(root)
                    .unwrap_or(&path)
                    .display()
                    .to_string();
                found.push((relative, fs::read_to_string(&path).unwrap_or_default()));
            }
        }
    }
    found.sort();
    found
}

fn show(path: &Path) -> String {
    path.strip_prefix(root())
        .unwrap_or(path)
        .display()
        .to_string()
}

/// Every YAML file below `folder` has documents with a kind and a name, and there is one at least.
fn examples(folder: &Path) -> Vec<String> {
    let mut problems = Vec::new();
    let mut documents = 0;
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        for file in fs::read_dir(entry.path()).into_iter().flatten().flatten() {
            let path = file.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "yaml")
            {
                let text = fs::read_to_string(&path).unwrap_or_default();
                match manifest(&text) {
                    Ok(count) => documents += count,
                    Err(error) => problems.push(format!("{}: {error:#}", show(&path))),
                }
            }
        }
    }
    if documents == 0 {
        problems.push(format!("{}: no manifest at all", show(folder)));
    }
    problems
}

fn manifest(text: &str) -> Result<usize> {
    let mut count = 0;
    for document in serde_yaml_ng::Deserializer::from_str(text) {
        let value = serde_yaml_ng::Value::deserialize(document)?;
        let text = |at: &serde_yaml_ng::Value| at.as_str().map(str::to_owned);
        let kind = value.get("kind").and_then(text);
        kind.with_context(|| format!("document {}: no kind", count + 1))?;
        value
            .get("apiVersion")
            .and_then(text)
            .with_context(|| format!("document {}: no apiVersion", count + 1))?;
        let name = value
            .get("metadata")
            .and_then(|metadata| metadata.get("name"))
            .and_then(text);
        name.with_context(|| format!("document {}: no metadata.name", count + 1))?;
        count += 1;
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_workspace_is_tidy() {
        let problems: Vec<_> = check_all()
            .into_iter()
            .flat_map(|(_, problems)| problems)
            .collect();
        assert!(problems.is_empty(), "\n{}", problems.join("\n"));
    }

    #[test]
    fn an_import_upwards_is_told_with_its_reason() {
        let said = import("mesh-core", "mesh-linux", None).unwrap();
        assert!(
            said.starts_with("mesh-core may not import mesh-linux: "),
            "{said}"
        );
        assert_eq!(import("mesh-core", "mesh-wire", None), None);
    }

    #[test]
    fn tests_may_import_what_stands_above_and_nothing_below() {
        assert_eq!(import("mesh-dns", "mesh-identity", Some("dev")), None);
        assert!(import("mesh-dns", "mesh-agent", Some("dev")).is_some());
        assert!(import("mesh-dns", "mesh-identity", None).is_some());
    }

    #[test]
    fn an_unknown_package_is_told() {
        assert!(import("mesh-new", "mesh-wire", None).is_some());
    }

    #[test]
    fn unsafe_is_found_outside_its_homes_and_not_in_comments() {
        let line = concat!("let a = uns", "afe { b };");
        assert_eq!(unsafe_code("mesh-core/src/lib.rs", line).len(), 1);
        assert_eq!(unsafe_code("mesh-linux/src/lib.rs", line).len(), 0);
        assert_eq!(
            unsafe_code("mesh-core/src/lib.rs", &format!("// {line}")).len(),
            0
        );
    }

    #[test]
    fn unfinished_work_is_found_in_code_and_comments() {
        assert_eq!(left_to_do("a.rs", concat!("    to", "do!()")).len(), 1);
        assert_eq!(
            left_to_do("a.rs", concat!("#[ig", "nore = \"slow\"]")).len(),
            1
        );
        assert_eq!(left_to_do("a.rs", concat!("// TO", "DO later")).len(), 1);
        assert_eq!(left_to_do("a.rs", "let done = true;").len(), 0);
    }

    #[test]
    fn a_long_file_is_told() {
        assert_eq!(length("a.rs", &"x\n".repeat(FILE_LINES_MAX + 1)).len(), 1);
        assert_eq!(length("a.rs", &"x\n".repeat(FILE_LINES_MAX)).len(), 0);
    }

    #[test]
    fn a_scenario_that_does_not_listen_to_the_logs_is_told() {
        let path = "netns-tests/tests/a.rs";
        let of = |end: &str| {
            format!(
                "fn helper() {{\n}}\n\n#[test]\nfn it_works() -> Result<()> {{\n    let mut mesh = Mesh::demo()?;\n    {end}\n}}\n"
            )
        };
        assert_eq!(unjudged(path, &of("mesh.all_run()")).len(), 1);
        assert_eq!(unjudged(path, &of("mesh.ends_well()")).len(), 0);
        assert_eq!(unjudged("xtask/src/a.rs", &of("mesh.all_run()")).len(), 0);
        let other = of("mesh.ends_well()") + &of("Ok(())");
        assert_eq!(unjudged(path, &other).len(), 1);
    }

    #[test]
    fn a_root_without_an_invariant_is_told() {
        assert!(no_invariant("//! A crate.\nfn main() {}"));
        assert!(!no_invariant("//! A crate.\n//!\n//! **Invariant:** none."));
    }

    #[test]
    fn a_dependency_counts_as_used_only_by_its_whole_name() {
        assert!(names(&["use serde_json::Value;"], "serde-json"));
        assert!(!names(
            &["use serde_json::Value;", "my_serde::x()"],
            "serde"
        ));
    }

    #[test]
    fn a_manifest_needs_kind_and_name() {
        let good = "apiVersion: v1\nkind: Service\nmetadata:\n  name: a\n";
        assert_eq!(manifest(&format!("{good}---\n{good}")).unwrap(), 2);
        assert!(manifest("apiVersion: v1\nmetadata:\n  name: a\n").is_err());
        assert!(manifest("kind: [").is_err());
    }

    #[test]
    fn a_folder_without_a_readme_is_told() {
        assert!(missing_readme(Path::new("/proc")).is_some());
        assert!(missing_readme(&root().join("xtask")).is_none());
    }
}
