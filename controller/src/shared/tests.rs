use std::collections::{BTreeMap, VecDeque};

use super::*;

type Rows = BTreeMap<Key, Found>;
type Other = Box<dyn FnOnce(&mut Far) + Send>;

/// A store beyond a network: what another controller does just before a commit, and answers that get lost.
#[derive(Default)]
struct Far {
    rows: Rows,
    revision: u64,
    others: VecDeque<Other>,
    lost_answers: u32,
    commits: u32,
}

impl std::fmt::Debug for Far {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Far").finish_non_exhaustive()
    }
}

impl Far {
    fn put(&mut self, key: Key, value: Vec<u8>) {
        self.revision += 1;
        let revision = self.revision;
        self.rows.insert(key, Found { value, revision });
    }

    /// As another controller would.
    fn let_in(&mut self, name: &str, seed: u8, last: u8) {
        let (id, overlay_v4) = (NodeId([seed; 32]), address(last));
        let node = encode_node(&Registered::new(id, overlay_v4));
        self.put(Key::Node(name.parse().unwrap()), node);
        self.put(Key::PublicKey(id), name.into());
        self.put(Key::Address(overlay_v4), name.into());
    }

    fn token(&self) -> TokenRecord {
        let found = &self.rows[&Key::Token("t".to_owned())];
        decode("far", "a token", &found.value).unwrap()
    }
}

impl Shared for Far {
    fn place(&self) -> String {
        "far".to_owned()
    }

    fn authority(
        &mut self,
        proposed: &CertificateAuthority,
    ) -> Result<CertificateAuthority, StoreError> {
        let (certificate, key) = (proposed.certificate_pem(), proposed.key_pem());
        Ok(CertificateAuthority::from_pem(&certificate, &key).unwrap())
    }

    fn nodes(&mut self) -> Result<(Nodes, u64), StoreError> {
        Ok((Nodes::new(), self.revision))
    }

    fn tokens(&mut self) -> Result<Vec<(String, TokenRecord)>, StoreError> {
        let rows = self.rows.iter().filter_map(|(key, found)| match key {
            Key::Token(id) => Some((id.clone(), decode("far", "a token", &found.value).unwrap())),
            Key::Node(_) | Key::Address(_) | Key::PublicKey(_) => None,
        });
        Ok(rows.collect())
    }

    fn get(&mut self, keys: &[Key]) -> Result<Vec<Option<Found>>, StoreError> {
        Ok(keys.iter().map(|key| self.rows.get(key).cloned()).collect())
    }

    fn commit(&mut self, seen: &[Seen], changes: &[Change]) -> Result<Option<u64>, StoreError> {
        self.commits += 1;
        if let Some(other) = self.others.pop_front() {
            other(self);
        }
        if seen
            .iter()
            .any(|(key, found)| self.rows.get(key) != found.as_ref())
        {
            return Ok(None);
        }
        for (key, value) in changes.iter().cloned() {
            match value {
                Some(value) => self.put(key, value),
                None => drop(self.rows.remove(&key)),
            }
        }
        if self.lost_answers > 0 {
            self.lost_answers -= 1;
            return Err(StoreError::Remote {
                place: "far".to_owned(),
                problem: "the answer got lost".to_owned(),
            });
        }
        Ok(Some(self.revision))
    }
}

#[test]
fn an_address_that_another_controller_gave_away_is_given_to_nobody_else() {
    let mut far = far(1);
    for last in 1..=3 {
        let other = move |far: &mut Far| far.let_in(&format!("other{last}"), 100 + last, last);
        far.others.push_back(Box::new(other));
    }
    let joined = let_in(&mut far, "a", 1).unwrap();
    assert_eq!((joined.overlay_v4, far.commits), (address(4), 4));
    assert_eq!(far.token().uses_left, 0);
}

#[test]
fn an_answer_that_got_lost_costs_no_second_use_and_no_second_address() {
    let mut far = far(1);
    far.lost_answers = 2;
    let joined = let_in(&mut far, "a", 1).unwrap();
    assert_eq!(joined.overlay_v4, address(1));
    let token = far.token();
    assert_eq!(
        (token.uses_left, token.used_by.as_slice()),
        (0, ["a".to_owned()].as_slice())
    );
    let addresses = far.rows.keys().filter(|key| matches!(key, Key::Address(_)));
    assert_eq!(addresses.count(), 1);
}

#[test]
fn the_last_use_of_a_token_is_one_node_s() {
    let mut far = far(1);
    far.others.push_back(Box::new(|far| {
        let mut token = far.token();
        token.uses_left = 0;
        token.used_by.push("other".to_owned());
        far.put(Key::Token("t".to_owned()), encode(&token));
    }));
    let refused = let_in(&mut far, "a", 1).unwrap_err();
    assert!(
        matches!(refused, JoinError::Refused(Refusal::UsedUp)),
        "{refused}"
    );
    assert!(!far.rows.contains_key(&Key::Node("a".parse().unwrap())));
}

#[test]
fn a_name_and_a_key_are_one_node_s() {
    let mut far = far(5);
    far.others.push_back(Box::new(|far| far.let_in("a", 9, 1)));
    let refused = let_in(&mut far, "a", 1).unwrap_err();
    assert!(
        matches!(refused, JoinError::Refused(Refusal::NameTaken(_))),
        "{refused}"
    );
    let refused = let_in(&mut far, "b", 9).unwrap_err();
    let JoinError::Refused(Refusal::KeyTaken(holder)) = refused else {
        panic!("{refused}");
    };
    assert_eq!(holder.as_str(), "a");
}

#[test]
fn who_comes_with_another_key_leaves_the_first_to_others() {
    let mut far = far(5);
    let pass = Pass::Vouched;
    let name = "a".parse().unwrap();
    for seed in [1, 2] {
        let id = NodeId([seed; 32]);
        let candidate = Candidate {
            name: &name,
            id,
            pass,
        };
        join(&mut far, candidate, 0, free).unwrap();
    }
    assert_eq!(let_in(&mut far, "b", 1).unwrap().overlay_v4, address(2));
}

#[test]
fn a_node_that_is_taken_out_leaves_its_key_but_not_its_address() {
    let mut far = far(5);
    let a: NodeName = "a".parse().unwrap();
    assert_eq!(remove_node(&mut far, &a, 50).unwrap(), None);
    let_in(&mut far, "a", 1).unwrap();
    let_in(&mut far, "b", 2).unwrap();
    far.lost_answers = 1;
    let (removed, _) = remove_node(&mut far, &a, 50).unwrap().unwrap();
    assert_eq!(
        (removed.removed_unix_s, removed.overlay_v4),
        (Some(50), address(1))
    );
    // Again it changes nothing, not even the time.
    let commits = far.commits;
    let (again, _) = remove_node(&mut far, &a, 60).unwrap().unwrap();
    assert_eq!((again, far.commits), (removed.clone(), commits));
    // Its key joins as another node, which gets another address, although nobody here knows of the first.
    let renamed = let_in(&mut far, "c", 1).unwrap();
    assert_eq!(renamed.overlay_v4, address(3));
    // Its name comes back with another key, and has its own address; the key of the other stays the other's.
    let back = let_in(&mut far, "a", 4).unwrap();
    assert_eq!(back, Registered::new(NodeId([4; 32]), address(1)));
    let refused = let_in(&mut far, "d", 1).unwrap_err();
    assert!(
        matches!(refused, JoinError::Refused(Refusal::KeyTaken(_))),
        "{refused}"
    );
    // Who is in the mesh by now is not forgotten.
    assert_eq!(forget_node(&mut far, &a, &removed).unwrap(), None);
    assert!(far.rows.contains_key(&Key::Address(address(1))));
}

#[test]
fn an_address_that_has_rested_is_free() {
    let mut far = far(5);
    let a: NodeName = "a".parse().unwrap();
    let_in(&mut far, "a", 1).unwrap();
    let (removed, _) = remove_node(&mut far, &a, 50).unwrap().unwrap();
    assert_eq!(let_in(&mut far, "b", 2).unwrap().overlay_v4, address(2));
    assert!(forget_node(&mut far, &a, &removed).unwrap().is_some());
    assert_eq!(let_in(&mut far, "c", 3).unwrap().overlay_v4, address(1));
}

#[test]
fn what_never_succeeds_ends_and_an_address_that_was_chosen_is_not_replaced() {
    let mut far = far(200);
    for n in 0..ATTEMPTS_MAX {
        let other = move |far: &mut Far| {
            far.put(Key::Token("t".to_owned()), encode(&token(200, n)));
        };
        far.others.push_back(Box::new(other));
    }
    let error = let_in(&mut far, "a", 1).unwrap_err();
    assert!(
        matches!(error, JoinError::Store(StoreError::Contended(_))),
        "{error}"
    );
    assert_eq!(far.commits, ATTEMPTS_MAX);

    far.let_in("other", 7, 9);
    let name = "pinned".parse().unwrap();
    let (id, pass) = (NodeId([3; 32]), Pass::Vouched);
    let candidate = Candidate {
        name: &name,
        id,
        pass,
    };
    let pinned =
        |_: Option<&Registered>, _: &BTreeSet<Ipv4Addr>| Ok::<_, Refusal>((address(9), ()));
    let error = join(&mut far, candidate, 0, pinned).unwrap_err();
    assert!(
        matches!(error, JoinError::Store(StoreError::AddressTaken(_))),
        "{error}"
    );
}

#[test]
fn a_token_is_made_and_revoked_once() {
    let mut far = Far {
        lost_answers: 1,
        ..Far::default()
    };
    create_token(&mut far, "t", &token(1, 0), 0).unwrap();
    assert_eq!(far.tokens().unwrap().len(), 1);
    // The next one forgets what expired long ago.
    create_token(&mut far, "u", &token(1, 0), 200 + REMEMBER_S).unwrap();
    let ids: Vec<_> = far
        .tokens()
        .unwrap()
        .into_iter()
        .map(|(id, _)| id)
        .collect();
    assert_eq!(ids, ["u"]);
    assert!(revoke_token(&mut far, "u").unwrap());
    assert!(!revoke_token(&mut far, "u").unwrap());
}

#[test]
fn what_an_embedded_store_had_is_adopted_once_and_replaces_nothing() {
    let mut far = Far {
        lost_answers: 1,
        ..Far::default()
    };
    far.let_in("n7", 200, 7);
    let nodes = (1..=100).map(|seed| {
        let id = NodeId([seed; 32]);
        let overlay_v4 = address(seed);
        let name: NodeName = format!("n{seed}").parse().unwrap();
        (name, Registered::new(id, overlay_v4))
    });
    let local = Local {
        authority: CertificateAuthority::generate("demo", std::time::SystemTime::now()).unwrap(),
        nodes: nodes.collect(),
        tokens: vec![("t".to_owned(), token(3, 0))],
    };
    adopt(&mut far, &local).unwrap();
    let registered = |far: &Far, name: &str| {
        let name: NodeName = name.parse().unwrap();
        let found = &far.rows[&Key::Node(name.clone())];
        decode_node("far", &name, &found.value).unwrap()
    };
    assert_eq!(registered(&far, "n7").id, NodeId([200; 32]));
    assert_eq!(registered(&far, "n100").overlay_v4, address(100));
    assert_eq!(far.token().uses_left, 3);
    let (rows, commits) = (far.rows.clone(), far.commits);
    adopt(&mut far, &local).unwrap();
    assert_eq!((far.rows, far.commits), (rows, commits));
}

fn far(uses: u32) -> Far {
    let mut far = Far::default();
    far.put(Key::Token("t".to_owned()), encode(&token(uses, 0)));
    far
}

fn token(uses_left: u32, salt: u32) -> TokenRecord {
    TokenRecord {
        secret_hash: [7; 32],
        description: salt.to_string(),
        expires_unix_s: 100,
        uses_left,
        node: None,
        used_by: Vec::new(),
    }
}

fn let_in(far: &mut Far, name: &str, seed: u8) -> Result<Registered, JoinError<Refusal>> {
    let name = name.parse().unwrap();
    let candidate = Candidate {
        name: &name,
        id: NodeId([seed; 32]),
        pass: Pass::Token("t", [7; 32]),
    };
    join(far, candidate, 0, free).map(|joined| joined.registered)
}

/// What it had, or the first that nobody has, as far as this controller knows: it knows of none.
#[expect(clippy::unnecessary_wraps, reason = "as `join` wants it")]
fn free(had: Option<&Registered>, taken: &BTreeSet<Ipv4Addr>) -> Result<(Ipv4Addr, ()), Refusal> {
    let free = || (1..).map(address).find(|one| !taken.contains(one)).unwrap();
    Ok((had.map_or_else(free, |had| had.overlay_v4), ()))
}

fn address(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(100, 96, 0, last)
}
