//! `trace`: what becomes of a flow's first packet.

use mesh_api::admin::{HopReport, TraceRequest, TraceResponse};
use serde::Serialize;

use crate::{
    Verdict, cli,
    failure::Failure,
    report::some,
    show::Report,
    table::{Cell, Tone, printable, table},
};

/// `trace`.
#[derive(Debug, Serialize)]
pub(crate) struct Trace {
    pub(crate) source: String,
    pub(crate) destination: String,
    /// `arrives`, `degraded`, `stopped`, or `unknown` where only another node knows.
    pub(crate) verdict: &'static str,
    /// What stops or slows it, and where; `null`: nothing does.
    pub(crate) cause: Option<String>,
    /// In the packet's order, the way back at the end.
    pub(crate) hops: Vec<Hop>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Hop {
    /// `there` or `back`.
    pub(crate) way: String,
    /// `name`, `service`, `endpoint`, `route`, `policy`, `path` or `mtu`.
    pub(crate) stage: String,
    /// Where it is decided.
    pub(crate) node: String,
    /// `ok`, `degraded`, `failed` or `unknown`.
    pub(crate) verdict: String,
    /// For people; its words may change.
    pub(crate) text: String,
    /// What counts such packets at this node; `null`: nothing does here.
    pub(crate) counter: Option<String>,
    /// Its value now; of all flows, not of this one.
    pub(crate) count: Option<u64>,
}

/// What the words on the command line ask for.
pub(crate) fn request(arguments: &cli::Trace) -> Result<TraceRequest, Failure> {
    let (source, destination) = match arguments.words.as_slice() {
        [destination] => (String::new(), destination),
        [source, destination] => (source.clone(), destination),
        _ => {
            return Err(Failure::Refused(
                "one or two words: [SOURCE] DESTINATION:PORT".to_owned(),
            ));
        }
    };
    let wrong = || {
        Failure::Refused(format!(
            "{destination:?} is no DESTINATION:PORT: edge-b1:22, shop/inventory:80, [fd00::1]:80"
        ))
    };
    let (host, port) = destination.rsplit_once(':').ok_or_else(wrong)?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let port: u16 = port.parse().map_err(|_| wrong())?;
    if host.is_empty() || port == 0 {
        return Err(wrong());
    }
    let protocol = if arguments.udp { "UDP" } else { "TCP" };
    Ok(TraceRequest {
        source,
        destination: host.to_owned(),
        port: port.into(),
        protocol: protocol.to_owned(),
    })
}

impl Trace {
    pub(crate) fn new(said: TraceResponse, port: u32) -> Self {
        let at = |verdict: &str| said.hops.iter().find(|hop| hop.verdict == verdict);
        let there = said.hops.iter().filter(|hop| hop.way == "there");
        let unknown = there
            .clone()
            .any(|hop| hop.verdict == "unknown" && hop.stage != "mtu");
        let found = at("failed").or_else(|| at("degraded"));
        let verdict = match found {
            Some(hop) if hop.verdict == "failed" => "stopped",
            Some(_) => "degraded",
            None if unknown => "unknown",
            None => "arrives",
        };
        let cause = found.map(|hop| format!("{} at {}: {}", hop.stage, hop.node, hop.text));
        let hop = |one: HopReport| Hop {
            count: (!one.counter.is_empty()).then_some(one.count),
            counter: some(one.counter),
            way: one.way,
            stage: one.stage,
            node: one.node,
            verdict: one.verdict,
            text: one.text,
        };
        Self {
            source: said.source,
            destination: format!("{}:{port}", said.destination),
            verdict,
            cause,
            hops: said.hops.into_iter().map(hop).collect(),
        }
    }
}

impl Report for Trace {
    fn text(&self, colours: bool) -> String {
        let flow = format!("{} to {}", self.source, self.destination);
        let head = match (self.verdict, &self.cause) {
            ("stopped", Some(cause)) => format!("stopped by {cause}"),
            ("degraded", Some(cause)) => format!("arrives, but {cause}"),
            ("arrives", _) => format!("{flow}: arrives, as far as this node knows"),
            _ => format!("{flow}: only another node knows, see below"),
        };
        let row = |hop: &Hop| {
            let tone = match hop.verdict.as_str() {
                "ok" => Tone::Good,
                "failed" => Tone::Bad,
                "degraded" => Tone::Warning,
                _ => Tone::Faint,
            };
            let counter = match (&hop.counter, hop.count) {
                (Some(counter), Some(count)) => format!("{counter} {count}"),
                _ => String::new(),
            };
            vec![
                (&hop.way).into(),
                (&hop.stage).into(),
                (&hop.node).into(),
                Cell::new(&hop.verdict, tone),
                (&hop.text).into(),
                counter.into(),
            ]
        };
        let rows = self.hops.iter().map(row).collect();
        let titles = ["WAY", "STAGE", "NODE", "VERDICT", "WHY", "COUNTED HERE"];
        format!("{}\n\n{}", printable(&head), table(&titles, rows, colours))
    }

    fn verdict(&self) -> Verdict {
        match self.verdict {
            "stopped" => Verdict::Down,
            "degraded" => Verdict::Degraded,
            _ => Verdict::Ok,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_read_with_their_port_and_v6_in_brackets() {
        let ask = |words: &[&str]| {
            let words = words.iter().map(|&word| word.to_owned()).collect();
            request(&cli::Trace { words, udp: false })
        };
        for (words, source, host, port) in [
            (&["edge-b1:22"][..], "", "edge-b1", 22),
            (
                &["edge-a1", "shop/inventory:80"],
                "edge-a1",
                "shop/inventory",
                80,
            ),
            (&["[fd00::1]:8080"], "", "fd00::1", 8080),
        ] {
            let asked = ask(words).unwrap();
            assert_eq!(
                (asked.source.as_str(), asked.destination.as_str()),
                (source, host)
            );
            assert_eq!((asked.port, asked.protocol.as_str()), (port, "TCP"));
        }
        for wrong in [
            "edge-b1",
            ":80",
            "edge-b1:0",
            "edge-b1:http",
            "edge-b1:99999",
        ] {
            assert!(matches!(ask(&[wrong]), Err(Failure::Refused(_))), "{wrong}");
        }
    }
}
