//! `cargo xtask crdgen`: the custom resources as files for `kubectl`, made from the types in `mesh-api`. It is here so that
//! `xtask` itself needs nothing of Kubernetes: it is the first that a clean checkout builds.
//!
//! **Invariant:** it writes in `deploy/kubernetes/crds` and nowhere else.

#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use mesh_api::crd;
use serde_json::Value;

const FIRST_LINE: &str = "# Made by `cargo xtask crdgen` from mesh-api/src/crd.\n";

/// Writes every file, and removes those of kinds that are gone.
fn main() -> Result<()> {
    let folder = folder();
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let files = files()?;
    for name in present()?.difference(&files.keys().cloned().collect()) {
        let path = folder.join(name);
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
    }
    for (name, text) in files {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        println!("{}", path.display());
    }
    Ok(())
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes/crds")
}

/// Every file by its name.
fn files() -> Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    for definition in crd::definitions() {
        let plural = definition.pointer("/spec/names/plural");
        let plural = plural.and_then(Value::as_str);
        let plural = plural.context("a definition has no plural")?;
        let name = format!("{plural}.yaml");
        let text = serde_yaml_ng::to_string(&sorted(definition))?;
        files.insert(name, format!("{FIRST_LINE}{text}"));
    }
    let mut kustomization = format!(
        "{FIRST_LINE}apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n"
    );
    for name in files.keys() {
        kustomization += &format!("- {name}\n");
    }
    files.insert("kustomization.yaml".to_owned(), kustomization);
    Ok(files)
}

fn present() -> Result<BTreeSet<String>> {
    let entries = fs::read_dir(folder()).context("read deploy/kubernetes/crds")?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let names: Result<BTreeSet<String>> = names.collect();
    Ok(names?
        .into_iter()
        .filter(|name| name.ends_with(".yaml"))
        .collect())
}

/// Whether `serde_json` keeps the order of fields depends on what else is built with it.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let fields: BTreeMap<_, _> = fields.into_iter().collect();
            let fields = fields.into_iter();
            Value::Object(fields.map(|(name, value)| (name, sorted(value))).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_)) => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_in_deploy_are_what_the_types_say() {
        let files = files().unwrap();
        let expected: BTreeSet<_> = files.keys().cloned().collect();
        assert_eq!(present().unwrap(), expected, "run `cargo xtask crdgen`");
        for (name, text) in files {
            let found = fs::read_to_string(folder().join(&name)).unwrap();
            assert!(found == text, "{name} is stale: run `cargo xtask crdgen`");
        }
    }
}
