//! `bugreport`: everything that helps somebody else to see what is wrong, in one folder, and no key in it.
//!
//! Nothing here reads the agent's state folder. What comes from daemons has no private key in it; what comes from logs is
//! looked through for whatever could be one.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    net::IpAddr,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use serde::Serialize;

use crate::{
    failure::Failure,
    show::Report,
    table::{bytes, printable},
};

/// Of each log the end: a day of a mesh with trouble, and a mail takes it.
const LOG_BYTES_MAX: u64 = 4 << 20;

/// What stands where a key was.
const KEY: &str = "[key]";

/// Shorter is no secret that is worth one: an id, a digest of [`crate::snapshot::Resource`].
const SECRET_LEN_MIN: usize = 32;

/// `bugreport`.
#[derive(Debug, Serialize)]
pub(crate) struct BugReport {
    pub(crate) folder: String,
    pub(crate) files: Vec<String>,
    /// Reports that could not be had, and why.
    pub(crate) missing: BTreeMap<String, String>,
    pub(crate) bytes: u64,
}

impl Report for BugReport {
    fn text(&self, _colours: bool) -> String {
        let mut text = format!(
            "wrote {} files to {}, {}: look through them before you send them\n",
            self.files.len(),
            printable(&self.folder),
            bytes(self.bytes)
        );
        for (name, why) in &self.missing {
            text += &printable(&format!("not in it: {name}: {why}"));
            text.push('\n');
        }
        text
    }
}

/// A folder that is being filled.
#[derive(Debug)]
pub(crate) struct Bundle {
    out: PathBuf,
    report: BugReport,
    redact: Option<Redact>,
}

impl Bundle {
    /// Makes the folder `out`, for its owner only. With `overlay`, addresses outside it are taken out.
    pub(crate) fn new(out: &Path, redact: Option<Redact>) -> Result<Self, Failure> {
        let folder = out.display().to_string();
        let made = DirBuilder::new().mode(0o700).create(out);
        made.map_err(|error| Failure::writing(out, &error))?;
        Ok(Self {
            out: out.to_owned(),
            redact,
            report: BugReport {
                folder,
                files: Vec::new(),
                missing: BTreeMap::new(),
                bytes: 0,
            },
        })
    }

    /// Puts one report in, or notes why there is none.
    pub(crate) fn add<T: Serialize>(
        &mut self,
        name: &str,
        said: Result<T, Failure>,
    ) -> Result<(), Failure> {
        match said {
            Ok(said) => {
                let json = serde_json::to_string_pretty(&said);
                let json = json.map_err(|error| Failure::Failed(error.to_string()))?;
                self.write(&format!("{name}.json"), &json)
            }
            Err(failure) => {
                self.report
                    .missing
                    .insert(name.to_owned(), failure.to_string());
                Ok(())
            }
        }
    }

    /// Puts the end of a log in.
    pub(crate) fn add_log(&mut self, path: &Path) -> Result<(), Failure> {
        let name = path
            .file_name()
            .map_or("log".into(), |name| name.to_string_lossy());
        match tail(path) {
            Ok(text) => {
                let name = format!("{}-{name}.txt", self.report.files.len());
                self.write(&name, &text)
            }
            Err(error) => {
                self.report
                    .missing
                    .insert(path.display().to_string(), error.to_string());
                Ok(())
            }
        }
    }

    fn write(&mut self, name: &str, text: &str) -> Result<(), Failure> {
        let text = without_keys(text);
        let text = match &mut self.redact {
            Some(redact) => redact.addresses(&text),
            None => text,
        };
        let path = self.out.join(name);
        let mut options = File::options();
        let file = options.write(true).create_new(true).mode(0o600).open(&path);
        let written = file.and_then(|mut file| file.write_all(text.as_bytes()));
        written.map_err(|error| Failure::writing(&path, &error))?;
        self.report.bytes += text.len() as u64;
        self.report.files.push(name.to_owned());
        Ok(())
    }

    pub(crate) fn finish(self) -> BugReport {
        self.report
    }
}

fn tail(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = fs::metadata(path)?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_BYTES_MAX)))?;
    let mut bytes = Vec::new();
    file.take(LOG_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// `text` without what could be a private key, a token or a password: PEM blocks, `hf1.…` tokens, and any word of base64 or
/// hexadecimal digits as long as a key. Public keys look the same and go with them: nobody needs them to see what is wrong.
pub(crate) fn without_keys(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(begin) = rest.find("-----BEGIN ") {
        let (before, block) = rest.split_at(begin);
        clean += before;
        clean += KEY;
        let end = block.find("-----END ").and_then(|end| {
            let after = block.get(end + "-----END ".len()..)?;
            Some(end + "-----END ".len() + after.find("-----")? + "-----".len())
        });
        // A block that was cut has its key all the same.
        rest = end.and_then(|end| block.get(end..)).unwrap_or_default();
    }
    clean += rest;
    words(&clean, |word| is_secret(word).then(|| KEY.to_owned()))
}

/// Characters of tokens, base64 of both alphabets, and addresses.
fn of_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '+' | '/' | '=' | '_' | '-' | '.' | ':')
}

fn is_secret(word: &str) -> bool {
    // `key=SECRET`, `https://user:SECRET`: each part by itself, and all of it, as base64 ends with `=`.
    let parts = word.split(['=', ':']).chain([word.trim_end_matches('=')]);
    let of_one = |part: &str| is_token(part) || part.split('.').any(is_key);
    parts.into_iter().any(of_one)
}

/// `hf1.…`: a join token.
fn is_token(part: &str) -> bool {
    part.split_once('.').is_some_and(|(head, _)| {
        let number = head.trim_start_matches('/').strip_prefix("hf");
        number.is_some_and(|number| {
            !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
        })
    })
}

/// As many digits of base64 or hexadecimal as a key of 32 bytes in base64 has less its ends, with a mixture that no word has.
fn is_key(part: &str) -> bool {
    let digit = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '/' | '_' | '-');
    if part.len() < SECRET_LEN_MIN || !part.chars().all(digit) {
        return false;
    }
    let hexadecimal = part.bytes().all(|byte| byte.is_ascii_hexdigit());
    let has = |wanted: fn(char) -> bool| part.chars().any(wanted);
    let mixed = has(|c| c.is_ascii_uppercase())
        && has(|c| c.is_ascii_lowercase())
        && has(|c| c.is_ascii_digit());
    hexadecimal || mixed
}

/// `text`, with each word replaced for which `with` has something else.
fn words(text: &str, mut with: impl FnMut(&str) -> Option<String>) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(begin) = rest.find(of_word) {
        let (before, from) = rest.split_at(begin);
        let (word, after) = from.split_at(from.find(|c| !of_word(c)).unwrap_or(from.len()));
        clean += before;
        match with(word) {
            Some(other) => clean += &other,
            None => clean += word,
        }
        rest = after;
    }
    clean + rest
}

/// Gives addresses outside the overlay other names, the same for the same.
#[derive(Debug)]
pub(crate) struct Redact {
    overlay: IpNet,
    known: BTreeMap<IpAddr, usize>,
}

impl Redact {
    pub(crate) fn new(overlay: IpNet) -> Self {
        Self {
            overlay,
            known: BTreeMap::new(),
        }
    }

    fn addresses(&mut self, text: &str) -> String {
        words(text, |word| {
            // `203.0.113.5:51820`, `203.0.113.5`, `2001:db8::1`; `[2001:db8::1]:443` is two words.
            let (address, port) = match word.rsplit_once(':') {
                Some((address, port)) if address.parse::<std::net::Ipv4Addr>().is_ok() => {
                    (address, Some(port))
                }
                _ => (word.trim_end_matches(['.', ':']), None),
            };
            let address: IpAddr = address.parse().ok()?;
            let harmless = address.is_loopback()
                || address.is_unspecified()
                || self.overlay.contains(&address);
            if harmless || is_link_local(address) {
                return None;
            }
            let next = self.known.len() + 1;
            let number = *self.known.entry(address).or_insert(next);
            let port = port.map_or(String::new(), |port| format!(":{port}"));
            Some(format!("address-{number}{port}"))
        })
    }
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIREGUARD: &str = "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=";

    #[test]
    fn whatever_could_be_a_key_is_taken_out_wherever_it_stands() {
        let hexadecimal = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";
        let url = "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0MTIz";
        let pem = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49AgEG\nABCD\n-----END PRIVATE KEY-----";
        for secret in [WIREGUARD, hexadecimal, url, "hf1.abc.def", pem] {
            for text in [
                format!("PrivateKey = {secret}\n"),
                format!("key={secret},"),
                format!("{{\"key\":\"{secret}\"}}"),
                format!("https://user:{secret}@proxy:3128/"),
                format!("ü{secret}ü"),
            ] {
                let clean = without_keys(&text);
                let inner = secret.lines().nth(1).unwrap_or(secret);
                assert!(!clean.contains(inner), "{clean} of {text}");
                assert!(clean.contains(KEY), "{clean}");
            }
        }
        // The end of a log may begin or end inside a block.
        let cut = without_keys("x -----BEGIN EC PRIVATE KEY-----\nMHcCAQEE");
        assert_eq!(cut, format!("x {KEY}"));
    }

    #[test]
    fn names_addresses_sentences_and_numbers_stay() {
        for text in [
            "node edge-a1 is unreachable: No relay is up, and no direct path works.",
            "inventory.shop.svc.cluster.local 10.43.0.10:80 fd00:1234:5678:9abc:def0:1234:5678:9abc",
            "2026-11-22T16:14:54.123456Z  INFO mesh_agent::sync: the-quite-long-name-of-a-deployment-in-a-cluster",
            "/sys/fs/bpf/holdfast/services/links/cgroup_connect4",
            "1234567890 \"digest\": \"00aa11bb22cc33dd\"",
        ] {
            assert_eq!(without_keys(text), text);
        }
    }

    #[test]
    fn an_address_outside_the_overlay_gets_one_other_name_everywhere() {
        let mut redact = Redact::new("100.96.0.0/12".parse().unwrap());
        let text = redact.addresses(
            "203.0.113.5:51820 [2001:db8::1]:443 100.96.1.1 127.0.0.1:53 169.254.53.53:53",
        );
        assert_eq!(
            text,
            "address-1:51820 [address-2]:443 100.96.1.1 127.0.0.1:53 169.254.53.53:53"
        );
        assert_eq!(redact.addresses("(203.0.113.5)"), "(address-1)");
        assert_eq!(
            redact.addresses("at 12:30:45, v0.1.0"),
            "at 12:30:45, v0.1.0"
        );
    }

    #[test]
    fn only_the_end_of_a_long_log_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.log");
        let mut text = "old\n".repeat(usize::try_from(LOG_BYTES_MAX / 4).unwrap());
        text += "new\n";
        fs::write(&path, text).unwrap();
        let end = tail(&path).unwrap();
        assert!(end.len() as u64 <= LOG_BYTES_MAX && end.ends_with("new\n"));
    }

    #[test]
    fn a_folder_that_is_there_is_not_written_to() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(
            Bundle::new(folder.path(), None),
            Err(Failure::Refused(_))
        ));
    }
}
