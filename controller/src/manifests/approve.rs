//! `spec.approved: true` in the manifest of a node that waits: only that changes, and comments stay.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt as _,
    os::unix::fs::chown,
    path::{Path, PathBuf},
};

use mesh_wire::id::NodeName;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde_yaml_ng::{Mapping, Value};

use super::{Source, parse::split, read};

/// Why nothing was written.
#[derive(Debug, thiserror::Error)]
pub enum ApproveError {
    /// The manifest is written in a way in which a line cannot be changed for sure.
    #[error(
        "MeshNode {node} at {at} cannot be changed safely: write `approved: true` into its spec by hand"
    )]
    Form {
        /// Whose it is.
        node: NodeName,
        /// Where it stands.
        at: Source,
    },
    /// A file.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: String,
        /// What the system says.
        error: io::Error,
    },
}

/// A file as it is to be.
#[derive(Debug, PartialEq, Eq)]
struct Edit {
    /// As it was when it was read; `None`: there was none.
    before: Option<String>,
    after: String,
}

/// Approves nodes in the folder of manifests: in their MeshNode, or in a file of their own if they have none yet. Gives the files' names,
/// in the order of the nodes.
///
/// # Errors
///
/// [`ApproveError`]. Nothing was written, unless the system refused the second file after the first.
pub fn approve(
    folder: &Path,
    nodes: &[(NodeName, Option<Source>)],
) -> Result<Vec<String>, ApproveError> {
    let mut edits: BTreeMap<String, Edit> = BTreeMap::new();
    let mut names = Vec::new();
    for (node, source) in nodes {
        let name = match source {
            Some(source) => {
                let form = || ApproveError::Form {
                    node: node.clone(),
                    at: source.clone(),
                };
                let Source::File {
                    file,
                    document,
                    item: None,
                    ..
                } = source
                else {
                    return Err(form());
                };
                let before = match edits.get(file) {
                    Some(edit) => edit.after.clone(),
                    None => whole(&folder.join(file))?,
                };
                let after = approved(&before, *document).ok_or_else(form)?;
                match edits.get_mut(file) {
                    Some(edit) => edit.after = after,
                    None => {
                        let before = Some(before);
                        edits.insert(file.clone(), Edit { before, after });
                    }
                }
                file.clone()
            }
            None => {
                let file = format!("meshnode-{node}.yaml");
                let (before, after) = (None, manifest(node));
                edits.insert(file.clone(), Edit { before, after });
                file
            }
        };
        names.push(name);
    }
    for (name, edit) in &edits {
        let path = folder.join(name);
        write(&path, edit).map_err(|error| failed(&path, error))?;
    }
    Ok(names)
}

fn whole(path: &Path) -> Result<String, ApproveError> {
    read(path)
        .map(|(text, _)| text)
        .map_err(|error| failed(path, error))
}

fn failed(path: &Path, error: io::Error) -> ApproveError {
    let path = path.display().to_string();
    ApproveError::File { path, error }
}

/// Of a node that has no MeshNode. JSON's quotes are YAML's: a name may look like a number.
fn manifest(node: &NodeName) -> String {
    format!(
        "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshNode\nmetadata: {{name: \"{node}\"}}\nspec: {{approved: true}}\n"
    )
}

/// At once or not at all: whoever reads the folder meanwhile sees the file before or after, and what somebody else wrote since it was
/// read is not lost.
fn write(path: &Path, edit: &Edit) -> io::Result<()> {
    let target = match edit.before {
        // Editors write what a link leads to, as well.
        Some(_) => fs::canonicalize(path)?,
        None => path.to_owned(),
    };
    let temporary = beside(&target);
    fs::write(&temporary, &edit.after)?;
    let done = put(&temporary, &target, edit);
    if done.is_err() {
        fs::remove_file(&temporary).ok(); // What cannot be removed is hidden, and no manifest.
    }
    done
}

fn put(temporary: &Path, target: &Path, edit: &Edit) -> io::Result<()> {
    let Some(before) = &edit.before else {
        fs::File::open(temporary)?.sync_all()?;
        return Ok(renameat_with(
            CWD,
            temporary,
            CWD,
            target,
            RenameFlags::NOREPLACE,
        )?);
    };
    let metadata = fs::metadata(target)?;
    fs::set_permissions(temporary, metadata.permissions())?;
    chown(temporary, Some(metadata.uid()), Some(metadata.gid()))?;
    fs::File::open(temporary)?.sync_all()?;
    if fs::read_to_string(target)? != *before {
        return Err(io::Error::other(
            "was changed by somebody else just now: try again",
        ));
    }
    fs::rename(temporary, target)
}

/// Hidden, so that nobody takes it for a manifest.
fn beside(target: &Path) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    target.with_file_name(format!(".{name}.approve"))
}

/// `text` with `spec.approved: true` in its document of this number, counted from 1; `None`: a line cannot say that there, or something
/// else would change.
fn approved(text: &str, document: usize) -> Option<String> {
    let all = split(text);
    let (line, old) = all.get(document.checked_sub(1)?)?;
    let start: usize = text.split_inclusive('\n').take(*line).map(str::len).sum();
    let mut wanted = value(old)?;
    let spec = wanted.as_mapping_mut()?.entry("spec".into());
    let spec = spec.or_insert_with(|| Mapping::new().into());
    if spec.is_null() {
        *spec = Mapping::new().into();
    }
    spec.as_mapping_mut()?
        .insert("approved".into(), true.into());
    if value(old).as_ref() == Some(&wanted) {
        return Some(text.to_owned());
    }
    let new = with_line(old);
    let (head, tail) = (text.get(..start)?, text.get(start + old.len()..)?);
    let whole = format!("{head}{new}{tail}");
    // What a parser reads decides, not what the lines look like.
    let same = split(&whole).len() == all.len() && value(&new)? == wanted;
    same.then_some(whole)
}

fn value(document: &str) -> Option<Value> {
    serde_yaml_ng::from_str(document).ok()
}

/// The document with a line more, or another one, if it is written as people write them.
fn with_line(document: &str) -> String {
    let mut lines: Vec<String> = document.split_inclusive('\n').map(str::to_owned).collect();
    let Some(at) = lines.iter().position(|line| line.starts_with("spec:")) else {
        let end = if document.ends_with('\n') { "" } else { "\n" };
        return format!("{document}{end}spec: {{approved: true}}\n");
    };
    let rest = lines
        .get(at)
        .map(|line| line.trim_start_matches("spec:").trim());
    let rest = rest.unwrap_or_default().to_owned();
    if rest.starts_with('{') {
        if let Some(line) = lines.get_mut(at) {
            *line = if line.contains("approved: false") {
                line.replacen("approved: false", "approved: true", 1)
            } else if line.contains("{}") {
                line.replacen("{}", "{approved: true}", 1)
            } else {
                line.replacen('{', "{approved: true, ", 1)
            };
        }
        return lines.concat();
    }
    let below = lines.iter().skip(at + 1).filter(|line| {
        let said = line.trim();
        !said.is_empty() && !said.starts_with('#')
    });
    let indent = below
        .map(|line| line.len() - line.trim_start().len())
        .next();
    let indent = " ".repeat(indent.filter(|&indent| indent > 0).unwrap_or(2));
    let own = format!("{indent}approved:");
    match lines
        .iter_mut()
        .skip(at)
        .find(|line| line.starts_with(&own))
    {
        Some(line) => *line = line.replacen("false", "true", 1),
        None => {
            if let Some(line) = lines.get_mut(at)
                && !line.ends_with('\n')
            {
                line.push('\n');
            }
            lines.insert(at + 1, format!("{own} true\n"));
        }
    }
    lines.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: &str =
        "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshNode\nmetadata: {name: a}\n";

    #[track_caller]
    fn check(spec: &str, wanted: &str) {
        let (before, behind) = (
            "# first\nkind: Service\n---\n",
            "---\n# last\nkind: Pod # b\n",
        );
        let text = format!("{before}{NODE}{spec}{behind}");
        let wanted = format!("{before}{NODE}{wanted}{behind}");
        assert_eq!(approved(&text, 2), Some(wanted));
    }

    #[test]
    fn a_line_is_added_or_changed_and_all_else_stays() {
        check("", "spec: {approved: true}\n");
        check("spec:\n", "spec:\n  approved: true\n");
        check("spec: {}\n", "spec: {approved: true}\n");
        check(
            "spec: {site: a} # hall\n",
            "spec: {approved: true, site: a} # hall\n",
        );
        check(
            "spec: {site: a, approved: false}\n",
            "spec: {site: a, approved: true}\n",
        );
        check(
            "spec: # of a\n\n    # where\n    site: a # hall\n    prefixes: [10.0.0.0/8]\n",
            "spec: # of a\n    approved: true\n\n    # where\n    site: a # hall\n    prefixes: [10.0.0.0/8]\n",
        );
        check(
            "spec:\n  site: a\n  approved: false # not yet\n",
            "spec:\n  site: a\n  approved: true # not yet\n",
        );
        // Approved in the meantime.
        check("spec: {approved: true}\n", "spec: {approved: true}\n");
        check("spec:\n  approved: true\n", "spec:\n  approved: true\n");
    }

    #[test]
    fn what_a_line_cannot_say_is_left_alone() {
        for text in [
            "{apiVersion: x, kind: MeshNode, metadata: {name: a}}\n",
            "{\"kind\": \"MeshNode\",\n \"spec\": {\"site\": \"a\"}}\n",
            "kind: MeshNode\nspec:\n  zone: |\n    approved: false\n  site: &a b\n  approved: no way\n",
            "kind: MeshNode\nspec: &one\n  site: a\n  site: b\n",
            "kind: MeshNode\nspec: {zone: \"approved: false\"}\n",
            "kind: MeshNode\n...\n",
            "kind: [\n",
        ] {
            assert_eq!(approved(text, 1), None, "{text}");
        }
        assert_eq!(approved("kind: MeshNode\n", 2), None);
        assert_eq!(approved("kind: MeshNode\n", 0), None);
    }

    fn at(file: &str, document: usize) -> Option<Source> {
        Some(Source::File {
            file: file.to_owned(),
            document,
            item: None,
            line: 1,
        })
    }

    #[test]
    fn two_nodes_of_one_file_and_one_of_none_are_written_at_once_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let text = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
        let file = folder.path().join("nodes.yaml");
        fs::write(&file, format!("{NODE}---\n{NODE}spec: {{}}\n")).unwrap();
        let node = |name: &str| name.parse::<NodeName>().unwrap();
        let all = [
            (node("a"), at("nodes.yaml", 1)),
            (node("b"), at("nodes.yaml", 2)),
            (node("1"), None),
        ];
        let broken = [&all[..], &[(node("c"), at("gone.yaml", 1))]].concat();
        let error = approve(folder.path(), &broken).unwrap_err().to_string();
        assert!(error.contains("gone.yaml"), "{error}");
        assert!(!text("nodes.yaml").contains("approved"));
        let names = approve(folder.path(), &all).unwrap();
        assert_eq!(names, ["nodes.yaml", "nodes.yaml", "meshnode-1.yaml"]);
        let own = "spec: {approved: true}\n";
        assert_eq!(text("nodes.yaml"), format!("{NODE}{own}---\n{NODE}{own}"));
        assert_eq!(text("meshnode-1.yaml"), manifest(&node("1")));
        // A file that is there already is somebody's.
        let again = approve(folder.path(), &all[2..]).unwrap_err().to_string();
        assert!(again.contains("exists"), "{again}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_somebody_else_wrote_meanwhile_stays_and_so_do_owner_and_mode() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.yaml");
        fs::write(&path, "theirs\n").unwrap();
        let edit = |before: &str| Edit {
            before: Some(before.to_owned()),
            after: "ours\n".to_owned(),
        };
        let error = write(&path, &edit("before\n")).unwrap_err().to_string();
        assert!(error.contains("somebody else"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "theirs\n");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        write(&path, &edit("theirs\n")).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "ours\n");
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o640);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
