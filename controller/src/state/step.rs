//! Changes of endpoints alone: they are published at the cost of what changed.

use std::{collections::BTreeMap, sync::Arc};

use mesh_api::{
    control::{Resource, ResourceKey},
    resources::SYNC_BYTES_MAX,
};

use super::{Published, State, Work, size};
use crate::{
    change::Change,
    history::{Step, Wanted},
};

impl State {
    /// Publishes what changed.
    pub(super) fn follow(&self, work: &mut Work, changed: Change) {
        let stepped = match changed {
            Change::Slices(slices) if work.may_step() => self.step(work, slices),
            Change::Nothing | Change::Slices(_) | Change::Any => Err(()),
        };
        if stepped.is_err() {
            self.refresh(work);
        }
    }

    /// The error is for who works out everything instead, and says what is wrong.
    fn step(
        &self,
        work: &mut Work,
        slices: BTreeMap<ResourceKey, Option<Arc<Resource>>>,
    ) -> Result<(), ()> {
        let planned = self.published(|published| published.plan(slices));
        let (step, bytes) = planned.ok_or(())?;
        let kept = self.keep(work, step, |published| published.bytes = bytes);
        kept.map_err(drop)?;
        let generation = self.published(|published| published.history.generation());
        self.generation.send_replace(generation);
        Ok(())
    }
}

impl Work {
    /// Whether slices make no difference but their own: what is published was worked out from all there is, and was kept.
    fn may_step(&self) -> bool {
        self.of_all && self.unsaved.is_none() && self.awaited().is_none()
    }
}

impl Published {
    /// The step in which these become so, and the size of everything after it; `None`: it would be too large.
    fn plan(
        &self,
        slices: BTreeMap<ResourceKey, Option<Arc<Resource>>>,
    ) -> Option<(Option<Step>, usize)> {
        let size = |resource: &Arc<Resource>| size(&Wanted::Resource(Arc::clone(resource)));
        let before = slices.keys().filter_map(|key| self.history.resource(key));
        let before: usize = before.map(size).sum();
        let now: usize = slices.values().flatten().map(size).sum();
        let bytes = self.bytes.saturating_sub(before) + now;
        let changes = slices
            .into_iter()
            .map(|(key, resource)| (key, resource.map(Wanted::Resource)));
        // Only nodes are signed.
        let step = self.history.plan_changes(changes, |_| Err(())).ok()?;
        (bytes <= SYNC_BYTES_MAX).then_some((step, bytes))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;
    use crate::{config::Settings, manifests::watch::FolderChange};

    const OTHERS: usize = 50;

    fn slice(name: &str, service: &str, address: &str) -> String {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}, namespace: shop, labels: \
             {{kubernetes.io/service-name: {service}}}}}\naddressType: IPv4\nports: [{{name: http, port: 80}}]\n\
             endpoints: [{{addresses: [{address}]}}]\n---\n"
        )
    }

    fn service(name: &str, port: u16) -> String {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{clusterIP: None, ports: [{{name: http, port: {port}}}]}}\n---\n"
        )
    }

    /// A controller whose folder has many slices in one file, and one in another.
    struct Lab {
        state: State,
        folder: TempDir,
    }

    impl Lab {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let many = (0..OTHERS).map(|number| slice(&format!("s{number}"), "orders", "10.0.0.9"));
            fs::write(folder.path().join("many.yaml"), many.collect::<String>()).unwrap();
            fs::write(
                folder.path().join("one.yaml"),
                slice("one", "orders", "10.0.0.1"),
            )
            .unwrap();
            let config = folder.path().join("controller.toml");
            let path = folder.path().display();
            let text = format!(
                "mesh_name = 'demo'\nlisten = '127.0.0.1:0'\nmanifests = '{path}'\nstate_dir = '{path}/state'\n"
            );
            fs::write(&config, text).unwrap();
            let state = State::open(Settings::read(&config).unwrap()).unwrap();
            Self { state, folder }
        }

        /// What of the mesh was told when that file became so, and whether all was worked out for it.
        fn write(&self, file: &str, text: &str) -> (Vec<String>, bool) {
            let had = *self.state.changes().borrow();
            let worked_out = || Arc::as_ptr(&self.state.work().desired);
            let before = worked_out();
            fs::write(self.folder.path().join(file), text).unwrap();
            let written = FolderChange::Files([file.to_owned()].into());
            self.state.scan(&written);
            let since = self.state.since(Some(had));
            let set = since
                .set
                .iter()
                .map(|set| mesh_api::convert::key(set).unwrap().to_string());
            let gone = since.removed.iter().map(|gone| format!("no {gone}"));
            (set.chain(gone).collect(), worked_out() != before)
        }

        /// To work out everything again would publish nothing else.
        #[track_caller]
        fn check(&self) {
            let now = || {
                (
                    *self.state.changes().borrow(),
                    self.state.answer_bytes(None),
                )
            };
            let stepped = now();
            self.state.refresh(&mut self.state.work());
            assert_eq!(now(), stepped);
        }
    }

    #[test]
    fn endpoints_that_change_are_told_alone_and_the_mesh_is_not_worked_out_again() {
        let lab = Lab::new();
        let told = |what: &str| (vec![what.to_owned()], false);
        let one = "endpoint slice shop/orders/one";
        for address in ["10.0.0.2", "10.0.0.33"] {
            assert_eq!(
                lab.write("one.yaml", &slice("one", "orders", address)),
                told(one)
            );
            lab.check();
        }
        assert_eq!(
            lab.write(
                "one.yaml",
                &format!("# why\n{}", slice("one", "orders", "10.0.0.33"))
            )
            .0,
            [""; 0]
        );
        let (told, worked_out) = lab.write("one.yaml", &slice("one", "carts", "10.0.0.33"));
        let moved = [
            "endpoint slice shop/carts/one",
            "no endpoint slice shop/orders/one",
        ];
        assert_eq!(
            (told, worked_out),
            (moved.map(str::to_owned).to_vec(), false)
        );
        lab.check();
    }

    #[test]
    fn whatever_else_changes_is_worked_out() {
        let lab = Lab::new();
        let text = slice("one", "orders", "10.0.0.1");
        let [orders, carts] = ["orders", "carts"].map(|name| service(name, 81));
        for with in [service("orders", 80), orders.clone(), orders + &carts] {
            let (told, worked_out) = lab.write("one.yaml", &format!("{text}{with}"));
            assert_eq!((told.is_empty(), worked_out), (false, true), "{with}");
        }
        let new = slice("new", "orders", "10.0.0.4");
        assert!(lab.write("new.yaml", &new).1);
        lab.check();
    }

    #[test]
    fn the_second_of_two_slices_by_one_name_counts_for_nothing() {
        let lab = Lab::new();
        lab.write("two.yaml", &slice("one", "orders", "10.0.0.2"));
        for address in ["10.0.0.3", "10.0.0.4"] {
            let (told, _) = lab.write("two.yaml", &slice("one", "orders", address));
            assert_eq!(told, [""; 0]);
        }
        let (told, worked_out) = lab.write("one.yaml", &slice("one", "orders", "10.0.0.5"));
        assert_eq!((told.len(), worked_out), (1, true));
        lab.check();
    }
}
