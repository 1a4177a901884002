//! What the admin socket tells of the resolver, and what its cache has of others' names.

use mesh_api::admin::{
    DnsCacheEntry, DnsCacheRequest, DnsCacheResponse, DnsFlushRequest, DnsFlushResponse,
    DnsStatusResponse, DnsUpstream, Health,
};
use mesh_core::snapshot::MeshSettings;
use mesh_dns::{
    counters::DropReason,
    inspect::{CachedAnswer, Inspector},
    local::BadRecords,
    upstream::{UpstreamReport, UpstreamState},
};
use tokio::task;
use tonic::Status;

use super::{
    Admin,
    diagnosis::{internal, millis},
};
use crate::{metrics, report};

impl Admin {
    /// Has no name that anybody asked for: it may go into a bug report.
    pub(super) fn dns_status_report(&self) -> DnsStatusResponse {
        let dns = &self.facts.dns;
        let view = dns.view();
        let mesh = view.as_ref().map(|view| &view.snapshot.mesh);
        let upstreams = dns.upstreams().into_iter();
        let upstreams: Vec<_> = upstreams
            .map(|(domain, one)| {
                let domain = (!domain.is_root()).then(|| domain.to_string());
                upstream(domain.unwrap_or_default(), one)
            })
            .collect();
        let gives_stale = dns
            .gave_stale()
            .is_some_and(|ago| ago < Inspector::STALE_TTL);
        let held = dns.held();
        let mut places = dns.listen().iter().map(|address| (*address, "UDP"));
        let answers = places.any(|place| !held.contains_key(&place));
        let mut unheard = report::held_problems(dns, &self.facts.interface);
        if dns.listen().is_empty() {
            unheard.push("this agent serves no names (`dns.listen` is empty)".to_owned());
        }
        let (health, problems) = judge(answers, unheard, mesh.is_some(), &upstreams, gives_stale);
        let counted = metrics::dns_counters(dns.counters()).into_iter();
        let drops = DropReason::ALL.into_iter();
        DnsStatusResponse {
            health: health.into(),
            problems,
            listen: texts(dns.listen()),
            zones: mesh.map(zones).unwrap_or_default(),
            generation: view.as_ref().map(|view| view.snapshot.generation.0),
            age_s: self.snapshot_age_s(),
            upstreams,
            counters: counted
                .map(|(name, _, count)| (name.trim_start_matches("dns_").to_owned(), count))
                .collect(),
            drops: drops
                .map(|one| (one.as_str().to_owned(), dns.counters().dropped(one)))
                .collect(),
            cached: dns.counters().cached.get(),
            cached_max: Inspector::CACHED_MAX as u64,
            stale_max_s: dns.stale_max().as_secs(),
            allow_from: texts(dns.allow_from()),
            leave_out_denied: dns.leave_out_denied(),
            query_log: dns.query_log(),
        }
    }

    /// Beside the driver: a full cache takes milliseconds to read.
    pub(super) async fn dns_cache_report(
        &self,
        request: DnsCacheRequest,
    ) -> Result<DnsCacheResponse, Status> {
        let dns = self.facts.dns.clone();
        let most = match request.entries_max {
            0 => usize::MAX,
            some => usize::try_from(some).unwrap_or(usize::MAX),
        };
        let page = task::spawn_blocking(move || dns.cache(&request.name, most));
        let page = page.await.map_err(internal)?.map_err(bad_name)?;
        Ok(DnsCacheResponse {
            entries: page.answers.into_iter().map(entry).collect(),
            matching: page.matching as u64,
        })
    }

    pub(super) async fn flush_dns(
        &self,
        request: DnsFlushRequest,
    ) -> Result<DnsFlushResponse, Status> {
        let dns = self.facts.dns.clone();
        let forgotten = task::spawn_blocking(move || dns.forget(&request.name));
        let forgotten = forgotten.await.map_err(internal)?.map_err(bad_name)?;
        Ok(DnsFlushResponse {
            forgotten: forgotten as u64,
        })
    }
}

fn bad_name(error: BadRecords) -> Status {
    Status::invalid_argument(error.to_string())
}

fn texts<T: ToString>(all: &[T]) -> Vec<String> {
    all.iter().map(ToString::to_string).collect()
}

fn zones(mesh: &MeshSettings) -> Vec<String> {
    let (v4, v6) = (mesh.overlay_v4, mesh.id.ula_prefix());
    vec![
        mesh.cluster_domain.clone(),
        mesh.node_domain.clone(),
        v4.to_string(),
        v6.to_string(),
    ]
}

fn upstream(domain: String, one: UpstreamReport) -> DnsUpstream {
    let (failed, failure) = one.failed.unzip();
    DnsUpstream {
        domain,
        address: one.address.to_string(),
        transport: one.transport.to_owned(),
        state: one.state.as_str().to_owned(),
        mean_ms: one.usual.map(|(mean, _)| report::ms(mean)),
        deviation_ms: one.usual.map(|(_, deviation)| report::ms(deviation)),
        next_after_ms: report::ms(one.hedge_after),
        passed_over_ms: one.passed_over.map(millis),
        failures: one.failures,
        answered_ago_ms: one.answered.map(millis),
        failed_ago_ms: failed.map(millis),
        failure: failure.unwrap_or_default(),
    }
}

fn entry(one: CachedAnswer) -> DnsCacheEntry {
    DnsCacheEntry {
        name: one.name,
        r#type: one.record_type,
        code: one.code,
        records_left_out: u32::try_from(one.records_all - one.records.len()).unwrap_or(u32::MAX),
        records: one.records,
        left_s: one.left.map(|left| left.as_secs()),
        stale_left_s: one.stale_left.as_secs(),
        hits: one.hits,
        dnssec_ok: one.dnssec_ok,
        checking_disabled: one.checking_disabled,
    }
}

/// Down: nobody is answered, or nothing of others' names. Degraded: some questions take longer, or get what is old, or no answer
/// where they come by TCP.
fn judge(
    answers: bool,
    unheard: Vec<String>,
    knows: bool,
    upstreams: &[DnsUpstream],
    gives_stale: bool,
) -> (Health, Vec<String>) {
    let fails = |one: &&DnsUpstream| {
        one.state == UpstreamState::PassedOver.as_str()
            || one.state == UpstreamState::Fails.as_str()
    };
    let fail: Vec<String> = upstreams
        .iter()
        .filter(fails)
        .map(|one| {
            let of = match one.domain.as_str() {
                "" => String::new(),
                domain => format!(" of {domain}"),
            };
            let (address, failure) = (&one.address, &one.failure);
            format!("the upstream {address}{of} gives no answers: {failure}")
        })
        .collect();
    let cut_off = !upstreams.is_empty() && fail.len() == upstreams.len();
    let mut problems = [unheard, fail].concat();
    if gives_stale {
        problems.push("answers beyond their time are given, as no upstream answers".to_owned());
    }
    if !knows {
        problems.push("there is no snapshot yet: the mesh's own names are not answered".to_owned());
    }
    let health = match problems.is_empty() {
        _ if !answers || cut_off => Health::Down,
        true => Health::Ok,
        false => Health::Degraded,
    };
    (health, problems)
}

#[cfg(test)]
mod tests {
    use std::{
        net::{SocketAddr, UdpSocket},
        sync::Arc,
    };

    use mesh_dns::{
        client,
        server::{DnsConfig, DnsServer},
        upstream::UpstreamConfig,
    };
    use tokio_util::sync::CancellationToken;

    use super::*;

    fn upstream_of(domain: &str, state: UpstreamState) -> DnsUpstream {
        DnsUpstream {
            domain: domain.to_owned(),
            address: "192.0.2.1:53".to_owned(),
            state: state.as_str().to_owned(),
            failure: "nothing came back in time".to_owned(),
            ..DnsUpstream::default()
        }
    }

    #[test]
    fn the_resolver_is_as_well_as_those_that_it_asks() {
        use UpstreamState::{Answers, Fails, PassedOver, Unknown};
        let of = |states: &[UpstreamState]| -> Vec<_> {
            states.iter().map(|state| upstream_of("", *state)).collect()
        };
        let health =
            |states: &[UpstreamState], stale| judge(true, Vec::new(), true, &of(states), stale).0;
        assert_eq!(health(&[], false), Health::Ok, "own names only");
        assert_eq!(health(&[Answers, Unknown], false), Health::Ok);
        assert_eq!(health(&[Answers], true), Health::Degraded);
        assert_eq!(health(&[Answers, PassedOver], false), Health::Degraded);
        assert_eq!(health(&[Unknown, Fails], false), Health::Degraded);
        assert_eq!(health(&[Fails, PassedOver], true), Health::Down);
        let unheard = |answers| judge(answers, vec!["by TCP".to_owned()], true, &[], false);
        assert_eq!(unheard(false).0, Health::Down);
        let said = vec!["by TCP".to_owned()];
        assert_eq!(unheard(true), (Health::Degraded, said));
        assert_eq!(
            judge(true, Vec::new(), false, &of(&[Answers]), false).0,
            Health::Degraded
        );
        let stub = [
            upstream_of("corp.example.", Fails),
            upstream_of("", Answers),
        ];
        let want = "the upstream 192.0.2.1:53 of corp.example. gives no answers: nothing came back in time";
        assert_eq!(
            judge(true, Vec::new(), true, &stub, false),
            (Health::Degraded, vec![want.to_owned()])
        );
    }

    /// Answers once, with the address 192.0.2.7 for an hour, and then never again.
    fn answers_once() -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 512];
            let (length, from) = socket.recv_from(&mut buffer).unwrap();
            let end = 12
                + buffer[12..length]
                    .iter()
                    .position(|byte| *byte == 0)
                    .unwrap()
                + 5;
            let mut answer = buffer[..2].to_vec();
            answer.extend([0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
            answer.extend(&buffer[12..end]);
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 14, 16, 0, 4, 192, 0, 2, 7]);
            socket.send_to(&answer, from).unwrap();
        });
        address
    }

    #[tokio::test]
    async fn what_a_resolver_was_told_is_shown_by_name_and_forgotten() {
        let stop = CancellationToken::new();
        let config = DnsConfig {
            listen: vec!["127.0.0.1:0".parse().unwrap()],
            upstreams: vec![UpstreamConfig::plain(answers_once())],
            ..DnsConfig::default()
        };
        let server = DnsServer::start(config, || None, || None, |_| None, stop.clone());
        let server = server.await.unwrap();
        let dns: Arc<Inspector> = Arc::new(server.inspector());
        let at = server.local_addresses()[0];
        client::ask(at, "www.secret.example", "A").await.unwrap();

        let page = dns.cache("Secret.example", 10).unwrap();
        let [one] = <[_; 1]>::try_from(page.answers).unwrap();
        let shown = entry(one);
        assert_eq!(
            (
                shown.name.as_str(),
                shown.r#type.as_str(),
                shown.code.as_str()
            ),
            ("www.secret.example.", "A", "NOERROR")
        );
        assert!(shown.records[0].ends_with("IN A 192.0.2.7"), "{shown:?}");
        assert!(shown.left_s.is_some_and(|left| left > 3_500), "{shown:?}");
        assert_eq!(dns.cache("other.example", 10).unwrap().matching, 0);
        assert!(dns.cache("a..b", 10).is_err());

        let upstreams = dns.upstreams().into_iter();
        let upstreams: Vec<_> = upstreams
            .map(|(_, one)| upstream(String::new(), one))
            .collect();
        assert_eq!(upstreams[0].state, "answers");
        assert!(upstreams[0].mean_ms.is_some());
        assert!(
            !format!("{upstreams:?}").contains("secret"),
            "no name of anybody's"
        );

        assert_eq!(dns.forget("example").unwrap(), 1);
        assert_eq!(
            (
                dns.cache("", 10).unwrap().matching,
                dns.counters().cached.get()
            ),
            (0, 0)
        );
        stop.cancel();
        server.stopped().await;
    }
}
