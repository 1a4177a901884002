//! `config.md`: the keys of the daemons' files, from the structs that read them.

use std::{collections::BTreeMap, fs};

use anyhow::{Context as _, Result};

use super::{Above, head, header, row};
use crate::root;

/// A daemon, where its structs are, and its shipped example.
const DAEMONS: [(&str, &[&str], &str); 3] = [
    (
        "mesh-agent",
        &[
            "mesh-agent/src/config.rs",
            "mesh-agent/src/config/dns.rs",
            "mesh-agent/src/proxy/settings.rs",
        ],
        "agent.toml",
    ),
    ("mesh-relay", &["relay/src/config.rs"], "relay.toml"),
    (
        "mesh-controller",
        &["controller/src/config.rs", "mesh-daemon/src/traces.rs"],
        "controller.toml",
    ),
];

/// What a file is read into.
const ROOT: &str = "ConfigFile";

/// What that is checked into; of most tables, what their names end with.
const CHECKED: &str = "Settings";

/// Types as people write them in TOML.
const TYPES: [(&str, &str); 22] = [
    ("bool", "true or false"),
    ("u16", "number"),
    ("u32", "number"),
    ("u64", "number"),
    ("usize", "number"),
    ("NonZeroUsize", "number from 1"),
    ("String", "text"),
    ("SecretText", "text"),
    ("NodeName", "name"),
    ("RelayName", "name"),
    ("SiteName", "name"),
    ("PathBuf", "path"),
    ("SocketAddr", "address and port"),
    ("ListenAddress", "address and port"),
    ("metrics::Listen", "address and port, or \"off\""),
    ("Collector", "`http://host[:port][/path]`"),
    ("IpAddr", "address"),
    ("IpNet", "prefix"),
    ("Controllers", "`host:port`, or a list of them"),
    ("DnsUpstream", "upstream"),
    ("PodNames", "\"off\", \"insecure\" or \"verified\""),
    ("PortFile", "number, or \"first-last\""),
];

struct Field {
    name: String,
    /// As the code has it.
    kind: String,
    attributes: String,
    about: String,
}

#[derive(Default)]
struct Source {
    structs: BTreeMap<String, Vec<Field>>,
    /// Functions that give defaults: what they give, and their comment.
    defaults: BTreeMap<String, (String, String)>,
    example: String,
}

pub(super) fn page() -> Result<String> {
    let about = "Each file is TOML; a key that is not here is refused, with its line. A daemon with a file that it cannot use ends with 64 and says \
                 which key. Examples: `examples/`.";
    let mut page = head("Configuration", about);
    for (daemon, files, example) in DAEMONS {
        let mut source = Source::default();
        for file in files {
            let text =
                fs::read_to_string(root().join(file)).with_context(|| format!("read {file}"))?;
            source.read(&text);
        }
        source.example = fs::read_to_string(root().join("examples").join(example))?;
        page += &format!("\n## {daemon}: `/etc/holdfast/{example}`\n");
        source
            .table(ROOT, "", &mut page)
            .with_context(|| files.join(", "))?;
    }
    Ok(page)
}

impl Source {
    fn read(&mut self, text: &str) {
        let text = text.split("#[cfg(test)]").next().unwrap_or_default();
        let mut lines = text.lines();
        let mut above = Above::default();
        while let Some(line) = lines.next() {
            if above.takes(line.trim()) {
                continue;
            }
            let comment = std::mem::take(&mut above);
            if let Some(name) = named(line, "struct ", " {") {
                let fields = fields(&mut lines);
                self.structs.insert(name.to_owned(), fields);
            } else if let Some(name) =
                named(line, "fn default_", "()").or(named(line, "fn ", "() ->"))
            {
                let whole = if line.contains("fn default_") {
                    format!("default_{name}")
                } else {
                    name.to_owned()
                };
                let body = lines.next().unwrap_or_default().trim();
                self.defaults
                    .insert(whole, (body.to_owned(), comment.text()));
            }
        }
    }

    /// A table, then the tables in it.
    fn table(&self, name: &str, path: &str, page: &mut String) -> Result<()> {
        let fields = self.structs.get(name);
        let fields = fields.with_context(|| format!("no struct {name}"))?;
        let mut tables = Vec::new();
        let mut rows = String::new();
        for field in fields {
            let (inner, list, optional) = parts(&field.kind);
            if self.structs.contains_key(inner) {
                tables.push((inner, join(path, &field.name), list));
                continue;
            }
            let kind = type_of(inner)?;
            let kind = if list {
                format!("list of: {kind}")
            } else {
                kind.to_owned()
            };
            let default = self.without(field, path, optional)?;
            let about = self.about(name, path, field);
            let about =
                about.with_context(|| format!("{name}: `{}` has no comment", field.name))?;
            rows += &row([&format!("`{}`", field.name), &kind, &default, &about]);
        }
        *page += &format!(
            "\n{}{rows}",
            header(["key", "type", "without it", "what it says"])
        );
        for (inner, path, list) in tables {
            let title = if list {
                format!("[[{path}]]")
            } else {
                format!("[{path}]")
            };
            *page += &format!("\n### `{title}`\n");
            self.table(inner, &path, page)?;
        }
        Ok(())
    }

    fn without(&self, field: &Field, path: &str, optional: bool) -> Result<String> {
        let shipped = self.in_example(path, &field.name);
        let in_force = shipped.clone().filter(|(_, in_force)| *in_force);
        let code = |value: String| format!("`{value}`");
        if let Some(function) = named(&field.attributes, "default = \"", "\"") {
            let found = self.defaults.get(function);
            let (body, comment) = found.with_context(|| format!("no fn {function}"))?;
            if let Some(value) = literal(body).or(in_force.map(|(value, _)| value)) {
                return Ok(code(value));
            }
            if !comment.is_empty() {
                return Ok(comment.clone());
            }
            let value = shipped.map(|(value, _)| code(value));
            return value
                .with_context(|| format!("fn {function} needs a comment that says what it gives"));
        }
        Ok(match (field.attributes.contains("default"), optional) {
            (true, _) if field.kind == "bool" => "`false`".to_owned(),
            (true, _) => "none".to_owned(),
            (false, true) => "–".to_owned(),
            (false, false) => "**needed**".to_owned(),
        })
    }

    /// Its comment, that of the checked setting of this name, or what the shipped example says above the key.
    fn about(&self, table: &str, path: &str, field: &Field) -> Option<String> {
        if !field.about.is_empty() {
            return Some(field.about.clone());
        }
        // Parts of a table's settings may be structs of their own.
        let is_checked = |name: &str| (name == CHECKED) == (table == ROOT);
        let structs = self.structs.iter().filter(|(name, _)| is_checked(name));
        let mut structs: Vec<_> = structs.collect();
        structs.sort_by_key(|(name, _)| !name.ends_with(CHECKED));
        let mut others = structs.into_iter().flat_map(|(_, fields)| fields);
        let other = others.find(|other| other.name == field.name && !other.about.is_empty());
        let settings = other.map(|other| other.about.replace("`None`:", "without it:"));
        settings.or_else(|| self.above_in_example(path, &field.name))
    }

    /// The lines of the shipped example that are about a table. One that is commented out ends with an empty line.
    fn section(&self, path: &str) -> Vec<&str> {
        let (mut table, mut aside) = ("", None);
        let mut found = Vec::new();
        for line in self.example.lines() {
            let header = header_of(line.trim_start_matches("# "));
            match header {
                Some(name) if line.starts_with('#') => aside = Some(name),
                Some(name) => (table, aside) = (name, None),
                None if line.is_empty() => aside = None,
                None => {}
            }
            if aside.unwrap_or(table) == path && header.is_none() {
                found.push(line);
            }
        }
        found
    }

    /// The value of a key, and whether it is not commented out.
    fn in_example(&self, path: &str, key: &str) -> Option<(String, bool)> {
        let start = format!("{key} = ");
        let mut lines = self.section(path).into_iter();
        lines.find_map(|line| {
            let value = line.trim_start_matches("# ").strip_prefix(&start)?;
            let value = value.split(" #").next().unwrap_or(value).trim();
            Some((value.to_owned(), !line.starts_with('#')))
        })
    }

    fn above_in_example(&self, path: &str, key: &str) -> Option<String> {
        let start = format!("{key} = ");
        let mut above: Vec<&str> = Vec::new();
        for line in self.section(path) {
            let text = line.trim_start_matches("# ");
            if text.starts_with(&start) {
                return (!above.is_empty()).then(|| above.join(" "));
            }
            match line.starts_with("# ") && !text.contains(" = ") {
                true => above.push(text),
                false => above.clear(),
            }
        }
        None
    }
}

/// `dns.stub` of `[[dns.stub]]`.
fn header_of(line: &str) -> Option<&str> {
    let inside = line.strip_prefix('[')?.split(']').next()?;
    Some(inside.trim_start_matches('['))
}

/// What stands between two texts.
fn named<'a>(line: &'a str, before: &str, after: &str) -> Option<&'a str> {
    let (_, rest) = line.split_once(before)?;
    rest.split_once(after).map(|(name, _)| name)
}

/// Of a struct, up to its end.
fn fields<'a>(lines: &mut impl Iterator<Item = &'a str>) -> Vec<Field> {
    let mut found = Vec::new();
    let mut above = Above::default();
    for line in lines.by_ref().take_while(|line| *line != "}") {
        let line = line.trim();
        if above.takes(line) {
            continue;
        }
        let above = std::mem::take(&mut above);
        let Some((name, kind)) = line.split_once(": ") else {
            continue;
        };
        found.push(Field {
            name: name.rsplit(' ').next().unwrap_or(name).to_owned(),
            kind: kind.trim_end_matches(',').to_owned(),
            attributes: above.attributes.clone(),
            about: above.text(),
        });
    }
    found
}

/// The type itself, whether it is a list, and whether it may be left out.
fn parts<'a>(kind: &'a str) -> (&'a str, bool, bool) {
    let inside = |of: &str, kind: &'a str| {
        kind.strip_prefix(of)
            .and_then(|kind| kind.strip_suffix('>'))
    };
    let optional = inside("Option<", kind);
    let kind = optional.unwrap_or(kind);
    let list = inside("Vec<", kind);
    (list.unwrap_or(kind), list.is_some(), optional.is_some())
}

fn type_of(kind: &str) -> Result<&'static str> {
    let known = TYPES.iter().find(|(code, _)| *code == kind);
    known.map(|(_, said)| *said).with_context(|| {
        format!("xtask/src/reference/config.rs does not know how {kind} is written in TOML")
    })
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}.{name}")
    }
}

/// What a function's one line gives, if it can be read off.
fn literal(body: &str) -> Option<String> {
    if let Some((_, rest)) = body.split_once('"') {
        return rest.split_once('"').map(|(text, _)| format!("{text:?}"));
    }
    if ["true", "false"].contains(&body) {
        return Some(body.to_owned());
    }
    let number = |text: &str| text.trim().replace('_', "").parse::<u64>().ok();
    if let Some(beyond_one) = named(body, "::MIN.saturating_add(", ")") {
        return number(beyond_one).map(|beyond_one| (beyond_one + 1).to_string());
    }
    let factors = body.split('*').map(number).collect::<Option<Vec<_>>>()?;
    Some(factors.iter().product::<u64>().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_their_types_defaults_and_comments() {
        let mut source = Source {
            example: "# What b says.\n# b = 7\n".to_owned(),
            ..Source::default()
        };
        source.read(
            "struct ConfigFile {\n    /// A.\n    a: String,\n    #[serde(default = \"default_b\")]\n    b: u16,\n    \
             #[serde(default)]\n    t: Vec<Table>,\n}\nfn default_b() -> u16 {\n    7 * 1_000\n}\nstruct Table {\n    /// C.\n    \
             c: Option<PathBuf>,\n}\n",
        );
        let mut page = String::new();
        source.table(ROOT, "", &mut page).unwrap();
        for line in [
            "| `a` | text | **needed** | A. |",
            "| `b` | number | `7000` | What b says. |",
            "### `[[t]]`",
            "| `c` | path | – | C. |",
        ] {
            assert!(page.lines().any(|found| found == line), "{line} in {page}");
        }
    }

    #[test]
    fn a_key_without_a_comment_or_of_an_unknown_type_is_told() {
        let table = |text: &str| {
            let mut source = Source::default();
            source.read(&format!("struct ConfigFile {{\n    {text},\n}}\n"));
            source
                .table(ROOT, "", &mut String::new())
                .unwrap_err()
                .to_string()
        };
        assert!(table("a: String").contains("`a` has no comment"));
        assert!(table("a: Odd").contains("Odd"));
    }
}
