//! What `deploy/` puts into a cluster for a controller.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use kube::{
    Api, Client,
    api::PostParams,
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use serde::Deserialize as _;
use serde_json::Value;

/// The controller's namespace.
pub(crate) const NAMESPACE: &str = "holdfast";

/// The controller's ServiceAccount.
pub(crate) const ACCOUNT: &str = "mesh-controller";

/// Definitions, namespace and rights, as an administrator creates them.
///
/// # Errors
///
/// If a file cannot be read, or the API server refuses an object.
pub(crate) async fn apply(client: &Client) -> Result<()> {
    for file in files()? {
        let text = fs::read_to_string(&file);
        let text = text.with_context(|| format!("read {}", file.display()))?;
        for document in serde_yaml_ng::Deserializer::from_str(&text) {
            let document = Value::deserialize(document)?;
            let place = || format!("{}: {document}", file.display());
            create(client, &document).await.with_context(place)?;
        }
    }
    Ok(())
}

fn files() -> Result<Vec<PathBuf>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/kubernetes");
    let mut files = vec![folder.join("base/namespace.yaml")];
    let definitions = folder.join("crds");
    let read = fs::read_dir(&definitions);
    for entry in read.with_context(|| format!("read {}", definitions.display()))? {
        let path = entry?.path();
        if !path.ends_with("kustomization.yaml") {
            files.push(path);
        }
    }
    files.push(folder.join("controller/rbac.yaml"));
    Ok(files)
}

async fn create(client: &Client, document: &Value) -> Result<()> {
    let text = |pointer: &str| document.pointer(pointer).and_then(Value::as_str);
    let version = text("/apiVersion").context("no apiVersion")?;
    let (group, version) = version.rsplit_once('/').unwrap_or(("", version));
    let kind = text("/kind").context("no kind")?;
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
    let objects: Api<DynamicObject> = match text("/metadata/namespace") {
        None => Api::all_with(client.clone(), &resource),
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
    };
    let object = serde_json::from_value(document.clone())?;
    objects.create(&PostParams::default(), &object).await?;
    Ok(())
}
