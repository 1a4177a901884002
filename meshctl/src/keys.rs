//! `keys`: this node's key and certificate, what ends when, another key, and taking a node's away. Public halves alone.

use std::time::{SystemTime, UNIX_EPOCH};

use clap::Subcommand;
use mesh_api::admin::{CertificateReport, KeysRequest, KeysResponse, PeerKey, RotateKeyRequest};
use serde::Serialize;

use crate::{
    Verdict,
    connect::{self, Agent, ask},
    events::clock,
    failure::{Daemon, Failure},
    run::Screen,
    show::{Report, row},
    table::{Cell, Tone, columns, duration, table},
};

/// A certificate is renewed at half of its time, 15 days before its end at the latest: less is left only where no controller
/// was reached for long.
const ENDS_SOON_S: i64 = 7 * 86_400;

#[derive(Debug, Subcommand)]
pub(crate) enum Keys {
    /// This node's WireGuard key and certificate, the authority's, and how old the sessions with peers are.
    List,
    /// What ends when.
    Expiry,
    /// Gives this node's certificate another key at once, by the controller that is connected. The WireGuard key stays: it is what
    /// the node is known by. Another one: `meshctl token create --node NAME`, and join again without the state folder.
    Rotate,
    /// Takes a node's keys away (controller): as `node remove`.
    Revoke {
        /// As `nodes` shows it.
        name: String,
    },
}

/// All but `revoke`, which is the controller's.
pub(crate) async fn run(
    agent: Agent<'_>,
    command: Keys,
    screen: Screen,
) -> Result<Verdict, Failure> {
    let mut client = connect::agent(agent).await?;
    if matches!(command, Keys::Rotate) {
        let said = ask(Daemon::Agent, client.rotate_key(RotateKeyRequest {})).await?;
        return screen.show(&Rotated {
            before: Certificate::from(said.before.unwrap_or_default()),
            now: Certificate::from(said.now.unwrap_or_default()),
        });
    }
    let said = ask(Daemon::Agent, client.keys(KeysRequest {})).await?;
    match command {
        Keys::Expiry => screen.show(&Expiry::new(&said, now_s())),
        Keys::List | Keys::Rotate | Keys::Revoke { .. } => screen.show(&List::from(said)),
    }
}

fn now_s() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    })
}

/// `keys list`.
#[derive(Debug, Serialize)]
pub(crate) struct List {
    pub(crate) node: String,
    /// WireGuard's; what the node is known by.
    pub(crate) public_key: String,
    pub(crate) certificate: Certificate,
    /// Who issued it: the mesh's.
    pub(crate) authority: Certificate,
    /// When the next certificate, with another key, is asked for.
    pub(crate) renew_at_unix_s: i64,
    pub(crate) peers: Vec<Peer>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Certificate {
    /// Hexadecimal.
    pub(crate) serial: String,
    /// A SPIFFE URI, or the authority's name.
    pub(crate) holder: String,
    pub(crate) not_before_unix_s: i64,
    pub(crate) not_after_unix_s: i64,
    /// Of the public key (SubjectPublicKeyInfo), hexadecimal.
    pub(crate) key_sha256: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct Peer {
    pub(crate) node: String,
    pub(crate) public_key: String,
    /// Since the keys of the session were agreed on, every two minutes while there is traffic; `null`: there is no session.
    pub(crate) session_ms: Option<u64>,
    /// A plain WireGuard device.
    pub(crate) external: bool,
}

impl From<CertificateReport> for Certificate {
    fn from(said: CertificateReport) -> Self {
        Self {
            serial: said.serial,
            holder: said.holder,
            not_before_unix_s: said.not_before_unix_s,
            not_after_unix_s: said.not_after_unix_s,
            key_sha256: said.key_sha256,
        }
    }
}

impl From<KeysResponse> for List {
    fn from(said: KeysResponse) -> Self {
        let peer = |one: PeerKey| Peer {
            node: one.node,
            public_key: one.public_key,
            session_ms: one.session_ms,
            external: one.external,
        };
        Self {
            node: said.node,
            public_key: said.public_key,
            certificate: said.certificate.unwrap_or_default().into(),
            authority: said.authority.unwrap_or_default().into(),
            renew_at_unix_s: said.renew_at_unix_s,
            peers: said.peers.into_iter().map(peer).collect(),
        }
    }
}

/// `2026-11-22 16:14:54 UTC`.
fn moment(unix_s: i64) -> String {
    format!("{} UTC", clock(unix_s.saturating_mul(1000)))
}

impl Certificate {
    fn rows(&self, name: &str) -> Vec<Vec<Cell>> {
        let (from, until) = (
            moment(self.not_before_unix_s),
            moment(self.not_after_unix_s),
        );
        vec![
            row(name, &self.holder),
            row("", format!("serial {}", self.serial)),
            row("", format!("from {from} until {until}")),
            row("", format!("key SHA-256 {}", self.key_sha256)),
        ]
    }
}

impl Report for List {
    fn text(&self, colours: bool) -> String {
        let mut rows = vec![row("node", &self.node), row("WireGuard", &self.public_key)];
        rows.extend(self.certificate.rows("certificate"));
        rows.push(row(
            "",
            format!("renewed at {}", moment(self.renew_at_unix_s)),
        ));
        rows.extend(self.authority.rows("authority"));
        let node = columns(&rows, colours);
        if self.peers.is_empty() {
            return node;
        }
        let row = |peer: &Peer| {
            let session = peer.session_ms;
            let session = session.map_or("-".to_owned(), |ms| duration(ms / 1000));
            let kind = if peer.external { "device" } else { "node" };
            vec![
                (&peer.node).into(),
                kind.into(),
                (&peer.public_key).into(),
                session.into(),
            ]
        };
        let head = ["PEER", "KIND", "PUBLIC KEY", "SESSION'S AGE"];
        let peers = table(&head, self.peers.iter().map(row).collect(), colours);
        format!("{node}\n{peers}")
    }
}

/// `keys expiry`.
#[derive(Debug, Serialize)]
pub(crate) struct Expiry {
    /// The soonest first.
    pub(crate) ends: Vec<End>,
    /// So long the state of the mesh counts after a controller spoke; `null`: for ever.
    pub(crate) offline_limit_s: Option<u64>,
}

#[derive(Debug, Serialize)]
pub(crate) struct End {
    /// `renewal` (the next certificate is asked for), `certificate` or `authority`.
    pub(crate) what: &'static str,
    pub(crate) at_unix_s: i64,
    /// By the clock of the machine that asks; negative: it is over.
    pub(crate) left_s: i64,
}

impl Expiry {
    fn new(said: &KeysResponse, now_s: i64) -> Self {
        let until =
            |one: &Option<CertificateReport>| one.as_ref().map_or(0, |one| one.not_after_unix_s);
        let end = |what, at_unix_s: i64| End {
            what,
            at_unix_s,
            left_s: at_unix_s.saturating_sub(now_s),
        };
        let mut ends = vec![
            end("renewal", said.renew_at_unix_s),
            end("certificate", until(&said.certificate)),
            end("authority", until(&said.authority)),
        ];
        ends.sort_by_key(|end| end.at_unix_s);
        Self {
            ends,
            offline_limit_s: said.offline_limit_s,
        }
    }
}

impl End {
    /// A renewal that is due waits for a controller.
    fn verdict(&self) -> Verdict {
        match self.left_s {
            left if self.what == "renewal" || left > ENDS_SOON_S => Verdict::Ok,
            left if left > 0 => Verdict::Degraded,
            _ => Verdict::Down,
        }
    }
}

impl Report for Expiry {
    fn text(&self, colours: bool) -> String {
        let row_of = |end: &End| {
            let left = match u64::try_from(end.left_s) {
                Ok(left) => format!("in {}", duration(left)),
                Err(_) if end.what == "renewal" => "due: waits for a controller".to_owned(),
                Err(_) => format!("over, {} ago", duration(end.left_s.unsigned_abs())),
            };
            let tone = match end.verdict() {
                Verdict::Ok => Tone::Plain,
                Verdict::Degraded => Tone::Warning,
                Verdict::Down | Verdict::Usage => Tone::Bad,
            };
            vec![
                end.what.into(),
                moment(end.at_unix_s).into(),
                Cell::new(left, tone),
            ]
        };
        let mut rows: Vec<_> = self.ends.iter().map(row_of).collect();
        let limit = match self.offline_limit_s {
            Some(limit_s) => format!("counts for {} without a controller", duration(limit_s)),
            None => "counts for ever without a controller".to_owned(),
        };
        rows.push(row("state of the mesh", limit));
        columns(&rows, colours)
    }

    fn verdict(&self) -> Verdict {
        let verdicts = self.ends.iter().map(End::verdict);
        verdicts.max().unwrap_or(Verdict::Ok)
    }
}

/// `keys rotate`.
#[derive(Debug, Serialize)]
pub(crate) struct Rotated {
    /// It counts until it ends; take the node away (`keys revoke`) if its key was stolen.
    pub(crate) before: Certificate,
    pub(crate) now: Certificate,
}

impl Report for Rotated {
    fn text(&self, colours: bool) -> String {
        let mut rows = self.now.rows("now");
        rows.extend(self.before.rows("before"));
        columns(&rows, colours)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_that_ends_soon_is_degraded_and_a_due_renewal_is_not() {
        let day = 86_400;
        let until = |days: i64| {
            Some(CertificateReport {
                not_after_unix_s: days * day,
                ..CertificateReport::default()
            })
        };
        for (now_days, verdict) in [
            (10, Verdict::Ok),
            (20, Verdict::Ok),
            (24, Verdict::Degraded),
            (31, Verdict::Down),
        ] {
            let said = KeysResponse {
                certificate: until(30),
                authority: until(3650),
                renew_at_unix_s: 15 * day,
                ..KeysResponse::default()
            };
            let expiry = Expiry::new(&said, now_days * day);
            assert_eq!(expiry.verdict(), verdict, "day {now_days}");
            assert_eq!(expiry.ends[1].left_s, (30 - now_days) * day);
        }
    }
}
