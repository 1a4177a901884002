//! Daemons that say what the tests want.

use std::time::{SystemTime, UNIX_EPOCH};

use mesh_api::admin::{
    self, agent_admin_server::AgentAdmin, controller_admin_server::ControllerAdmin,
};
use tonic::{Request, Response, Status};

use crate::{inside, names};

type Stream<T> = std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

pub(crate) struct Agent {
    pub(crate) health: admin::Health,
}

pub(crate) fn texts(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}

/// The node whose agent is to answer; `closed` answers nobody.
fn asked<T>(request: &Request<T>) -> Result<String, Status> {
    match request.metadata().get("holdfast-node") {
        None => Ok("edge-a1".to_owned()),
        Some(name) if name == "closed" => Err(Status::permission_denied("closed to edge-a1")),
        Some(name) => Ok(name.to_str().unwrap().to_owned()),
    }
}

#[tonic::async_trait]
impl AgentAdmin for Agent {
    async fn status(
        &self,
        request: Request<admin::StatusRequest>,
    ) -> Result<Response<admin::StatusResponse>, Status> {
        let node = asked(&request)?;
        let relay = |name: &str, transport: &str, home, rtt_ms, problem: &str| admin::RelayStatus {
            name: name.to_owned(),
            transport: transport.to_owned(),
            home,
            rtt_ms,
            problem: problem.to_owned(),
        };
        Ok(Response::new(admin::StatusResponse {
            node,
            public_key: "KEY=".to_owned(),
            version: "0.1.0".to_owned(),
            overlay_addresses: texts(&["100.96.0.1", "fd00::1"]),
            site: "a".to_owned(),
            health: self.health.into(),
            problems: texts(&["relay r2 is down"]),
            uptime_ms: 90_061_000,
            controller_connected: true,
            controller_asked_in_s: 0,
            controller: "cloud:7440".to_owned(),
            snapshot_generation: 42,
            snapshot_age_s: 3,
            standing: admin::Standing::Warned.into(),
            standing_left_s: 7_200,
            relays: vec![
                relay("r1", "quic", true, 20.5, ""),
                relay("r2", "", false, 0.0, "refused"),
            ],
            nat: "port_restricted".to_owned(),
            reflexive_addresses: texts(&["203.0.113.5:40000"]),
            peers: [("direct".to_owned(), 3), ("relayed".to_owned(), 1)].into(),
            nodes: 5,
            services: 7,
            dns_listen: texts(&["169.254.53.53:53"]),
            drops: [("no_route".to_owned(), 2), ("malformed".to_owned(), 0)].into(),
            interface: "holdfast0".to_owned(),
            local_addresses: texts(&["192.168.7.1:51820"]),
            certificate_expires_unix_s: 0,
            service_interfaces: [("lan0".to_owned(), true), ("lan1".to_owned(), false)].into(),
            service_packets: [("flow_opened".to_owned(), 2), ("hairpin".to_owned(), 0)].into(),
            services_unkept: "/sys/fs/bpf is no bpffs".to_owned(),
            policy_enforced: true,
            policy_packets: [("passed".to_owned(), 3), ("denied".to_owned(), 1)].into(),
            policy_events: texts(&[
                "denied by defaultAction: TCP 100.96.0.2:40000 to 100.96.0.1:22, in",
            ]),
            proxy: [("open", 1), ("refused", 4), ("failed", 0)]
                .map(|(name, count)| (name.to_owned(), count))
                .into(),
            uplinks: vec![
                admin::UplinkStatus {
                    interface: "eth0".to_owned(),
                    used: true,
                    up: true,
                    weight: 65_435,
                    ..admin::UplinkStatus::default()
                },
                admin::UplinkStatus {
                    interface: "wwan0".to_owned(),
                    metered: true,
                    weight: 7,
                    ..admin::UplinkStatus::default()
                },
            ],
            port_mappings: [("192.168.7.254", "203.0.113.5:51820 by PCP")]
                .map(|(gateway, said)| (gateway.to_owned(), said.to_owned()))
                .into(),
            lan_announcements: [("sent", 3), ("forged", 0)]
                .map(|(name, count)| (name.to_owned(), count))
                .into(),
            transitions: [("peer relayed direct", 3), ("path probing standby", 5)]
                .map(|(name, count)| (name.to_owned(), count))
                .into(),
        }))
    }

    async fn peers(
        &self,
        _: Request<admin::PeersRequest>,
    ) -> Result<Response<admin::PeersResponse>, Status> {
        let direct = admin::Peer {
            name: "edge-b1".to_owned(),
            public_key: "B=".to_owned(),
            site: "b".to_owned(),
            overlay_addresses: texts(&["100.96.0.3"]),
            state: "direct".to_owned(),
            path: "203.0.113.5:51820".to_owned(),
            rtt_ms: 41.2,
            sent_bytes: 1536,
            received_bytes: 10,
            last_received_ms: Some(1200),
            last_handshake_ms: Some(60_000),
            ..admin::Peer::default()
        };
        let lost = admin::Peer {
            name: "edge-c1".to_owned(),
            state: "unreachable".to_owned(),
            reason: "peer_offline".to_owned(),
            ..admin::Peer::default()
        };
        let peers = vec![direct, lost];
        Ok(Response::new(admin::PeersResponse { peers }))
    }

    type PingStream = Stream<admin::PingResponse>;

    async fn ping(
        &self,
        request: Request<admin::PingRequest>,
    ) -> Result<Response<Self::PingStream>, Status> {
        let request = request.into_inner();
        if request.via == "relay:r9" {
            return Err(Status::not_found("no relay r9, but r1, r2"));
        }
        let by_relay = !request.via.is_empty() || request.target == "edge-c1";
        let answers = match request.target.as_str() {
            "edge-b1" | "edge-c1" => request.count,
            "lossy" => 1,
            _ => 0,
        };
        let replies = (1..=request.count).map(move |sequence| {
            let (path, kind) = if sequence == 1 || by_relay {
                ("relay r1 (quic)", "relay")
            } else {
                ("203.0.113.5:51820", "direct")
            };
            Ok(admin::PingResponse {
                sequence,
                rtt_ms: (sequence <= answers).then(|| 10.0 * f64::from(sequence)),
                path: path.to_owned(),
                kind: kind.to_owned(),
            })
        });
        Ok(Response::new(Box::pin(tokio_stream::iter(replies))))
    }

    async fn path_why(
        &self,
        request: Request<admin::PathWhyRequest>,
    ) -> Result<Response<admin::PathWhyResponse>, Status> {
        let node = request.into_inner().node;
        if node == "nobody" {
            return Err(Status::not_found("no node nobody"));
        }
        Ok(Response::new(admin::PathWhyResponse {
            node,
            state: "relayed".to_owned(),
            reason: "hard_nat_one".to_owned(),
            explanation: "its NAT maps by destination".to_owned(),
            own_nat: "port_restricted".to_owned(),
            peer_nat: "symmetric".to_owned(),
            paths: vec![admin::PathReport {
                path: "relay r1 (quic)".to_owned(),
                kind: "relay".to_owned(),
                state: "primary".to_owned(),
                rtt_ms: 44.0,
                loss: 0.01,
                probes_sent: 100,
                probes_answered: 99,
                full_size_ok: true,
            }],
            transitions: vec![
                admin::TransitionReport {
                    ago_ms: 62_000,
                    from: "candidate".to_owned(),
                    to: "primary".to_owned(),
                    reason: "taken".to_owned(),
                    path: "relay r1 (quic)".to_owned(),
                },
                admin::TransitionReport {
                    ago_ms: 61_000,
                    from: "waking".to_owned(),
                    to: "relayed".to_owned(),
                    reason: "handshake_done".to_owned(),
                    path: String::new(),
                },
            ],
            next_attempt_ms: Some(4200),
        }))
    }

    async fn services(
        &self,
        _: Request<admin::ServicesRequest>,
    ) -> Result<Response<admin::ServicesResponse>, Status> {
        let endpoint =
            |address: &str, node: &str, tier: &str, alive, chosen| admin::EndpointReport {
                address: address.to_owned(),
                node: node.to_owned(),
                tier: tier.to_owned(),
                ready: true,
                alive,
                chosen,
                ejected: address == "10.9.9.9:8080",
                full: address == "10.2.4.1",
            };
        let inventory = admin::ServiceReport {
            namespace: "shop".to_owned(),
            name: "inventory".to_owned(),
            kind: "ClusterIP".to_owned(),
            cluster_ips: texts(&["10.43.0.10"]),
            ports: texts(&["http 80/TCP"]),
            endpoints: vec![
                endpoint("10.2.3.1:8080", "edge-b1", "same-site", true, true),
                endpoint("10.9.9.9:8080", "", "anywhere", true, false),
            ],
        };
        let lost = admin::ServiceReport {
            namespace: "shop".to_owned(),
            name: "lost".to_owned(),
            kind: "Headless".to_owned(),
            endpoints: vec![endpoint("10.2.4.1", "edge-c1", "anywhere", false, false)],
            ..admin::ServiceReport::default()
        };
        let new = admin::ServiceReport {
            namespace: "shop".to_owned(),
            name: "new".to_owned(),
            kind: "ClusterIP".to_owned(),
            cluster_ips: texts(&["10.43.0.11"]),
            ..admin::ServiceReport::default()
        };
        let services = vec![inventory, lost, new];
        Ok(Response::new(admin::ServicesResponse { services }))
    }

    async fn dns_query(
        &self,
        request: Request<admin::DnsQueryRequest>,
    ) -> Result<Response<admin::DnsQueryResponse>, Status> {
        let request = request.into_inner();
        let (code, answers) = match request.name.as_str() {
            "nxdomain" | "servfail" => (request.name.to_ascii_uppercase(), Vec::new()),
            name => {
                let answer = format!("{name}. 5 IN {} fd00::1", request.r#type);
                ("NOERROR".to_owned(), vec![answer])
            }
        };
        Ok(Response::new(admin::DnsQueryResponse {
            code,
            answers,
            ms: 0.4,
            server: "169.254.53.53:53".to_owned(),
        }))
    }

    async fn dns_status(
        &self,
        _: Request<admin::DnsStatusRequest>,
    ) -> Result<Response<admin::DnsStatusResponse>, Status> {
        Ok(Response::new(names::status(self.health)))
    }

    async fn dns_cache(
        &self,
        request: Request<admin::DnsCacheRequest>,
    ) -> Result<Response<admin::DnsCacheResponse>, Status> {
        Ok(Response::new(names::cache(&request.into_inner())))
    }

    async fn dns_flush(
        &self,
        request: Request<admin::DnsFlushRequest>,
    ) -> Result<Response<admin::DnsFlushResponse>, Status> {
        names::flush(&request.into_inner()).map(Response::new)
    }

    async fn drops(
        &self,
        _: Request<admin::DropsRequest>,
    ) -> Result<Response<admin::DropsResponse>, Status> {
        let drop = |part: &str, reason: &str, packets, explanation: &str| admin::DropReport {
            part: part.to_owned(),
            reason: reason.to_owned(),
            packets,
            explanation: explanation.to_owned(),
        };
        Ok(Response::new(admin::DropsResponse {
            drops: vec![
                drop("tunnel", "no_route", 2, "Out: nobody has it."),
                drop("tunnel", "replayed", 0, "In: seen before."),
                drop("policy", "denied", 40, "Nobody allows it."),
            ],
            uptime_ms: 90_061_000,
        }))
    }

    async fn events(
        &self,
        _: Request<admin::EventsRequest>,
    ) -> Result<Response<admin::EventsResponse>, Status> {
        let event = |ago_ms: u64, of: &str, name: &str, change: [&str; 3], path: &str| {
            let at_unix_ms = 1_795_364_094_000 - i64::try_from(ago_ms).unwrap();
            let [from, to, reason] = change.map(str::to_owned);
            admin::EventReport {
                ago_ms,
                at_unix_ms,
                of: of.to_owned(),
                name: name.to_owned(),
                path: path.to_owned(),
                from,
                to,
                reason,
            }
        };
        let direct = "203.0.113.5:51820";
        Ok(Response::new(admin::EventsResponse {
            events: vec![
                event(62_000, "relay", "r1 (quic)", ["", "up", ""], ""),
                event(
                    61_000,
                    "path",
                    "edge-b1",
                    ["standby", "primary", "taken"],
                    direct,
                ),
                event(
                    60_000,
                    "peer",
                    "edge-b1",
                    ["relayed", "direct", "probe_answered"],
                    "",
                ),
                event(
                    3_000,
                    "health",
                    "",
                    ["ok", "degraded", "no relay is up"],
                    "",
                ),
            ],
            forgotten: 1,
        }))
    }

    async fn snapshots(
        &self,
        request: Request<admin::SnapshotsRequest>,
    ) -> Result<Response<admin::SnapshotsResponse>, Status> {
        let resource = |kind: &str, name: &str, digest: &str| admin::ResourceReport {
            kind: kind.to_owned(),
            name: name.to_owned(),
            digest: digest.to_owned(),
        };
        let slot = |file: &str, sequence, resources| admin::SlotReport {
            file: file.to_owned(),
            sequence,
            bytes: 2048,
            store_id: "abab".to_owned(),
            generation: 40 + sequence,
            epoch: 1,
            made_unix_ms: 7,
            received_unix_s: 1,
            signed: true,
            resources,
            ..admin::SlotReport::default()
        };
        let node = |digest| resource("node", "edge-b1", digest);
        let mut newer = slot(
            "snapshot.1",
            2,
            vec![node("bb"), resource("relay", "r2", "cc")],
        );
        let older = slot(
            "snapshot.0",
            1,
            vec![node("aa"), resource("relay", "r1", "cc")],
        );
        let mut slots = vec![older];
        match self.health {
            admin::Health::Down => {
                slots.clear();
                newer.damage = "damaged: checksum does not match".to_owned();
            }
            admin::Health::Degraded => {
                newer.signed = false;
                let problem = "the resources are not those that the head was signed for";
                newer.problems.push(problem.to_owned());
            }
            admin::Health::Ok | admin::Health::Unspecified => {}
        }
        if request.into_inner().contents {
            newer.contents = b"encoded".to_vec();
        }
        slots.insert(0, newer);
        Ok(Response::new(admin::SnapshotsResponse {
            slots,
            generation: 42,
            age_s: 3700,
        }))
    }

    async fn trace(
        &self,
        request: Request<admin::TraceRequest>,
    ) -> Result<Response<admin::TraceResponse>, Status> {
        let asked = request.into_inner();
        let hop =
            |way: &str, stage: &str, node: &str, verdict: &str, text: &str| admin::HopReport {
                way: way.to_owned(),
                stage: stage.to_owned(),
                node: node.to_owned(),
                verdict: verdict.to_owned(),
                text: text.to_owned(),
                ..admin::HopReport::default()
            };
        let mut hops = vec![hop("there", "route", "edge-a1", "ok", "edge-b1 has it")];
        match asked.port {
            22 => hops.push(admin::HopReport {
                counter: "denied".to_owned(),
                count: 40,
                ..hop(
                    "there",
                    "policy",
                    "edge-a1",
                    "failed",
                    "denied by MeshPolicy no-22",
                )
            }),
            23 => hops.push(hop(
                "there",
                "mtu",
                "edge-a1",
                "degraded",
                "only small packets pass",
            )),
            24 => hops.push(hop(
                "there",
                "path",
                "edge-c1",
                "unknown",
                "only edge-c1 knows",
            )),
            _ => hops.push(hop(
                "back",
                "path",
                "edge-b1",
                "unknown",
                "only edge-b1 knows",
            )),
        }
        if asked.destination == "nobody" {
            return Err(Status::not_found("no node nobody"));
        }
        Ok(Response::new(admin::TraceResponse {
            source: "edge-a1".to_owned(),
            destination: asked.destination,
            hops,
        }))
    }

    async fn facts(
        &self,
        _: Request<admin::FactsRequest>,
    ) -> Result<Response<admin::FactsResponse>, Status> {
        Ok(Response::new(admin::FactsResponse {
            state_dir: "/var/lib/holdfast".to_owned(),
            state_free_bytes: Some(if self.health == admin::Health::Down {
                0
            } else {
                1 << 30
            }),
            overlay_v4: "100.96.0.0/12".to_owned(),
            mtu_bytes: 1280,
            troubles: vec![admin::PeerTrouble {
                node: "edge-c1".to_owned(),
                state: "relayed".to_owned(),
                reason: "mtu_fail".to_owned(),
                explanation: "Only small packets pass by the direct path.".to_owned(),
                small_only: texts(&["203.0.113.9:51820"]),
            }],
            ..admin::FactsResponse::default()
        }))
    }

    async fn bpf(
        &self,
        request: Request<admin::BpfRequest>,
    ) -> Result<Response<admin::BpfResponse>, Status> {
        Ok(Response::new(inside::bpf(
            self.health,
            request.into_inner(),
        )))
    }

    async fn route(
        &self,
        request: Request<admin::RouteRequest>,
    ) -> Result<Response<admin::RouteResponse>, Status> {
        Ok(Response::new(inside::route(&request.into_inner().address)))
    }

    async fn explain_policy(
        &self,
        request: Request<admin::ExplainPolicyRequest>,
    ) -> Result<Response<admin::ExplainPolicyResponse>, Status> {
        inside::explain(&request.into_inner()).map(Response::new)
    }

    async fn keys(
        &self,
        _: Request<admin::KeysRequest>,
    ) -> Result<Response<admin::KeysResponse>, Status> {
        Ok(Response::new(inside::keys()))
    }

    async fn rotate_key(
        &self,
        _: Request<admin::RotateKeyRequest>,
    ) -> Result<Response<admin::RotateKeyResponse>, Status> {
        match self.health {
            admin::Health::Down => Err(Status::unavailable("no controller is connected")),
            admin::Health::Ok | admin::Health::Degraded | admin::Health::Unspecified => {
                Ok(Response::new(inside::rotated()))
            }
        }
    }
}

pub(crate) struct Controller {
    pub(crate) problems: Vec<String>,
}

#[tonic::async_trait]
impl ControllerAdmin for Controller {
    async fn create_token(
        &self,
        request: Request<admin::CreateTokenRequest>,
    ) -> Result<Response<admin::CreateTokenResponse>, Status> {
        let request = request.into_inner();
        Ok(Response::new(admin::CreateTokenResponse {
            token: format!("secret-{}-{}-{}", request.ttl_s, request.uses, request.node),
            id: "t1".to_owned(),
            expires_unix_s: 99,
        }))
    }

    async fn list_tokens(
        &self,
        _: Request<admin::ListTokensRequest>,
    ) -> Result<Response<admin::ListTokensResponse>, Status> {
        let token = admin::TokenReport {
            id: "t1".to_owned(),
            description: "rack 4".to_owned(),
            expires_unix_s: 99,
            uses_left: 2,
            node: String::new(),
        };
        let used = admin::TokenReport {
            id: "t2".to_owned(),
            uses_left: 0,
            node: "edge-c".to_owned(),
            ..token.clone()
        };
        let tokens = vec![token, used];
        Ok(Response::new(admin::ListTokensResponse { tokens }))
    }

    async fn revoke_token(
        &self,
        request: Request<admin::RevokeTokenRequest>,
    ) -> Result<Response<admin::RevokeTokenResponse>, Status> {
        match request.into_inner().id.as_str() {
            "t1" => Ok(Response::new(admin::RevokeTokenResponse {})),
            other => Err(Status::not_found(format!("no token {other}"))),
        }
    }

    async fn accept_rollback(
        &self,
        _: Request<admin::AcceptRollbackRequest>,
    ) -> Result<Response<admin::AcceptRollbackResponse>, Status> {
        let epoch = 2;
        Ok(Response::new(admin::AcceptRollbackResponse { epoch }))
    }

    async fn list_nodes(
        &self,
        _: Request<admin::ListNodesRequest>,
    ) -> Result<Response<admin::ListNodesResponse>, Status> {
        let node = admin::NodeReport {
            name: "edge-a1".to_owned(),
            public_key: "KEY=".to_owned(),
            overlay_addresses: texts(&["100.96.0.1", "fd00::1"]),
            site: "a".to_owned(),
            connected: true,
            generation: 42,
            last_seen_unix_s: 99,
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let gone = admin::NodeReport {
            name: "edge-a2".to_owned(),
            connected: false,
            generation: 0,
            // An hour and some: what is shown has no seconds.
            last_seen_unix_s: i64::try_from(now.as_secs()).unwrap() - 3_610,
            ..node.clone()
        };
        let unseen = admin::NodeReport {
            name: "edge-a3".to_owned(),
            last_seen_unix_s: 0,
            ..gone.clone()
        };
        let nodes = vec![node, gone, unseen];
        Ok(Response::new(admin::ListNodesResponse { nodes }))
    }

    async fn remove_node(
        &self,
        request: Request<admin::RemoveNodeRequest>,
    ) -> Result<Response<admin::RemoveNodeResponse>, Status> {
        match request.into_inner().name.as_str() {
            "edge-a1" => Ok(Response::new(admin::RemoveNodeResponse {
                address_rests_until_unix_s: 99,
            })),
            other => Err(Status::not_found(format!("no node {other}"))),
        }
    }

    async fn list_waiting(
        &self,
        _: Request<admin::ListWaitingRequest>,
    ) -> Result<Response<admin::ListWaitingResponse>, Status> {
        let node = admin::WaitingReport {
            name: "edge-c".to_owned(),
            public_key: "KEY=".to_owned(),
            address: "203.0.113.7".to_owned(),
            since_unix_s: 99,
        };
        let (manual, nodes) = (true, vec![node]);
        Ok(Response::new(admin::ListWaitingResponse { manual, nodes }))
    }

    async fn approve_nodes(
        &self,
        request: Request<admin::ApproveNodesRequest>,
    ) -> Result<Response<admin::ApproveNodesResponse>, Status> {
        let report = |name: String| match name.as_str() {
            "edge-c" => Ok(admin::ApprovedReport {
                name,
                file: "nodes.yaml".to_owned(),
            }),
            other => Err(Status::not_found(format!("no node {other} waits"))),
        };
        let nodes = request.into_inner().names.into_iter().map(report);
        let nodes = nodes.collect::<Result<_, _>>()?;
        Ok(Response::new(admin::ApproveNodesResponse { nodes }))
    }

    async fn issue_relay(
        &self,
        request: Request<admin::IssueRelayRequest>,
    ) -> Result<Response<admin::IssueRelayResponse>, Status> {
        let name = request.into_inner().name;
        Ok(Response::new(admin::IssueRelayResponse {
            certificate_pem: format!("certificate of {name}\n"),
            key_pem: format!("key of {name}\n"),
            ca_pem: "ca\n".to_owned(),
        }))
    }

    async fn status(
        &self,
        _: Request<admin::ControllerStatusRequest>,
    ) -> Result<Response<admin::ControllerStatusResponse>, Status> {
        Ok(Response::new(admin::ControllerStatusResponse {
            trust_domain: "demo".to_owned(),
            generation: 42,
            nodes: 5,
            agents_connected: 4,
            problems: self.problems.clone(),
            mesh_id: "abcd".to_owned(),
            serves: true,
            leads: false,
        }))
    }
}
