//! What a request does to an object: create, update, patch, apply, delete, each checked as the real
//! server checks it. No I/O: time and randomness come in.

use std::{collections::BTreeSet, sync::Arc};

use serde_json::{Value, json};

use super::{
    apply::{self, Writer},
    builtin, crd,
    decode::Body,
    error::{ApiError, ApiResult, Cause},
    events,
    fields::Typed,
    kinds::{Catalog, Kind, definitions},
    metadata, object, patch,
    rbac::{self, User},
    service::Pools,
    store::{Store, Stored},
};

/// What is done about fields that a kind does not have, or that are said twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Validation {
    Ignore,
    #[default]
    Warn,
    Strict,
}

/// How a request wants to be done.
#[derive(Debug, Clone, Default)]
pub(crate) struct Options {
    pub(crate) user: User,
    /// `fieldManager`, or what the client calls itself.
    pub(crate) manager: String,
    pub(crate) dry_run: bool,
    pub(crate) validation: Validation,
    pub(crate) force: bool,
    /// RFC 3339 with whole seconds.
    pub(crate) now: String,
    /// New objects keep the status that they come with.
    pub(crate) with_status: bool,
    /// Said to the client in `Warning` headers.
    pub(crate) warnings: Vec<String>,
}

/// Where an object is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    /// `status`, or nothing.
    pub(crate) subresource: &'a str,
}

/// How a patch is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PatchKind {
    Merge,
    Json,
    Strategic,
    Apply,
}

/// Everything that the server is, without its sockets.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) store: Store,
    pub(crate) catalog: Catalog,
    pub(crate) pools: Pools,
    /// Namespaces that were deleted, and whose content is still to go.
    pub(crate) ending: Vec<String>,
    /// The certificate that every namespace is told to trust.
    pub(crate) ca_pem: String,
}

impl State {
    /// # Errors
    ///
    /// As the API says for POST.
    pub(crate) fn create(
        &mut self,
        kind: &Kind,
        namespace: &str,
        body: Body,
        options: &mut Options,
    ) -> ApiResult<Value> {
        let mut new = self.read(kind, body, options)?;
        metadata::place(kind, &mut new, namespace, None)?;
        let namespace = object::namespace(&new).to_owned();
        self.check_namespace(kind, &namespace)?;
        if let Some(prefix) = object::text(&new, &["metadata", "generateName"]).map(str::to_owned)
            && object::name(&new).is_empty()
        {
            let name = self.free_name(kind, &namespace, &prefix);
            object::set(&mut new, &["metadata", "name"], name);
        }
        let name = object::name(&new).to_owned();
        if self.store.get(&kind.resource, &namespace, &name).is_some() {
            return Err(ApiError::already_exists(&kind.group, &kind.plural, &name));
        }
        if object::text(&new, &["metadata", "resourceVersion"]).is_some_and(|one| !one.is_empty()) {
            let why = "resourceVersion should not be set on objects to be created";
            return Err(ApiError::bad_request(why));
        }
        self.write(kind, None, new, "", options, false)
    }

    /// # Errors
    ///
    /// As the API says for PUT.
    pub(crate) fn update(
        &mut self,
        kind: &Kind,
        place: Place<'_>,
        body: Body,
        options: &mut Options,
    ) -> ApiResult<Value> {
        let new = self.read(kind, body, options)?;
        let old = self.existing(kind, place.namespace, place.name)?;
        let version = object::text(&new, &["metadata", "resourceVersion"]).unwrap_or_default();
        if version.is_empty() && !kind.updates_unconditionally() {
            let why = "must be specified for an update";
            let cause = Cause::invalid("metadata.resourceVersion", &"0x0".into(), why);
            return Err(ApiError::invalid(
                &kind.group,
                &kind.kind,
                place.name,
                &[cause],
            ));
        }
        self.replace(kind, old, new, place, options, false)
    }

    /// # Errors
    ///
    /// As the API says for PATCH.
    pub(crate) fn patch(
        &mut self,
        kind: &Kind,
        place: Place<'_>,
        how: PatchKind,
        body: Body,
        options: &mut Options,
    ) -> ApiResult<Value> {
        if how == PatchKind::Apply {
            return self.apply(kind, place, body, options);
        }
        let old = self.existing(kind, place.namespace, place.name)?;
        let mut new = old.clone();
        match how {
            PatchKind::Merge => patch::merge(&mut new, &body.value),
            PatchKind::Json => patch::json(&mut new, &body.value)?,
            PatchKind::Strategic | PatchKind::Apply if kind.custom => {
                return Err(ApiError::new(
                    415,
                    "UnsupportedMediaType",
                    "the body of the request was in an unknown format - accepted media types include: \
                     application/json-patch+json, application/merge-patch+json, \
                     application/apply-patch+yaml",
                ));
            }
            PatchKind::Strategic | PatchKind::Apply => {
                patch::strategic(&mut new, &body.value, &kind.schema, definitions());
            }
        }
        // What is given is only what the patch says: a patch of lists cannot be told apart.
        let body = Body {
            value: new,
            duplicates: body.duplicates,
        };
        let new = self.read(kind, body, options)?;
        self.replace(kind, old, new, place, options, false)
    }

    fn apply(
        &mut self,
        kind: &Kind,
        place: Place<'_>,
        body: Body,
        options: &mut Options,
    ) -> ApiResult<Value> {
        let mut config = body.value;
        if options.manager.is_empty() {
            let why = "is required for apply patch";
            let cause = Cause::required("fieldManager", why);
            return Err(ApiError::invalid(
                "meta.k8s.io",
                "PatchOptions",
                "",
                &[cause],
            ));
        }
        if object::at(&config, &["metadata", "managedFields"])
            .is_some_and(|given| given.as_array().is_none_or(|given| !given.is_empty()))
        {
            return Err(ApiError::bad_request("metadata.managedFields must be nil"));
        }
        self.check_type(kind, &config)?;
        if !kind.custom {
            object::strip_nulls(&mut config);
        }
        if let Some(unknown) = kind.schema.prune(&mut config, definitions()).first() {
            let why = format!(
                "failed to create typed patch object ({}/{}; {}, Kind={}): .{unknown}: field not \
                 declared in schema",
                place.namespace,
                place.name,
                kind.api_version(),
                kind.kind
            );
            return Err(ApiError::internal(why));
        }
        if !body.duplicates.is_empty() {
            return Err(ApiError::bad_request(format!(
                "error decoding YAML: duplicate field {:?}",
                body.duplicates
            )));
        }
        metadata::place(kind, &mut config, place.namespace, Some(place.name))?;
        let old = self.existing(kind, place.namespace, place.name).ok();
        if old.is_none() && !place.subresource.is_empty() {
            return Err(ApiError::not_found(&kind.group, &kind.plural, place.name));
        }
        let uid = object::uid(&config);
        if old.is_none() && !uid.is_empty() {
            let why =
                "uid mismatch: the provided object specified uid, and no existing object was found";
            return Err(ApiError::conflict(
                &kind.group,
                &kind.plural,
                place.name,
                why,
            ));
        }
        if old.is_none() {
            self.check_namespace(kind, place.namespace)?;
        }
        if let Some(old) = &old {
            check_version(kind, old, &config)?;
        }
        let writer = writer(kind, place.subresource, options);
        let live = old.clone().unwrap_or_else(|| json!({}));
        let typed = Typed::new(&kind.schema, definitions());
        let merged = apply::apply(
            &live,
            &config,
            &writer,
            options.force,
            typed,
            kind.has_status,
        )
        .map_err(|conflicts| ApiError::apply_conflict(&conflicts))?;
        match old {
            Some(old) => self.replace(kind, old, merged, place, options, true),
            None => self.write(kind, None, merged, "", options, true),
        }
    }

    /// # Errors
    ///
    /// As the API says for DELETE.
    pub(crate) fn delete(
        &mut self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        delete: &Value,
        options: &Options,
    ) -> ApiResult<Value> {
        let old = self.existing(kind, namespace, name)?;
        for (key, got) in [
            ("uid", object::uid(&old)),
            (
                "resourceVersion",
                object::text(&old, &["metadata", "resourceVersion"]).unwrap_or_default(),
            ),
        ] {
            let wanted = object::text(delete, &["preconditions", key]);
            if wanted.is_some_and(|wanted| wanted != got) {
                let why = format!(
                    "Precondition failed: {key} in precondition: {}, {key} in object meta: {got}",
                    wanted.unwrap_or_default()
                );
                return Err(ApiError::conflict(&kind.group, &kind.plural, name, &why));
            }
        }
        let dry_run = options.dry_run || !object::texts(delete, &["dryRun"]).is_empty();
        if dry_run {
            return Ok(old);
        }
        let orphan = object::text(delete, &["propagationPolicy"]) == Some("Orphan");
        Ok(self.remove(kind, &old, orphan, &options.now))
    }

    /// Takes an object away, or marks it if finalizers hold it; gives its last state.
    fn remove(&mut self, kind: &Kind, old: &Value, orphan: bool, now: &str) -> Value {
        let (namespace, name) = (object::namespace(old), object::name(old));
        let held = !object::list(old, &["metadata", "finalizers"]).is_empty();
        let is_namespace = kind.resource == builtin::NAMESPACES;
        let going = object::at(old, &["metadata", "deletionTimestamp"]).is_some();
        if is_namespace && !going {
            self.ending.push(name.to_owned());
        }
        if held || is_namespace && !(going && self.is_empty(name)) {
            let mut marked = old.clone();
            if !going {
                object::set(&mut marked, &["metadata", "deletionTimestamp"], now);
                object::set(&mut marked, &["metadata", "deletionGracePeriodSeconds"], 0);
                if is_namespace {
                    object::set(&mut marked, &["status", "phase"], "Terminating");
                }
                return self.store.put(&kind.resource, marked).value();
            }
            return marked;
        }
        let Some(last) = self.store.delete(&kind.resource, namespace, name) else {
            return old.clone();
        };
        let last = last.value();
        self.pools.release(kind, &last);
        if kind.resource == crd::RESOURCE {
            self.drop_custom(&last, now);
        }
        if !orphan {
            self.collect_dependents(object::uid(&last), now);
        }
        self.finish_namespace(namespace, now);
        last
    }

    /// Deletes everything in a namespace that is to end, and the namespace once it is empty.
    pub(crate) fn end_namespace(&mut self, namespace: &str, now: &str) {
        for resource in self.store.resources() {
            let Some(kind) = self.catalog.of_resource(&resource).cloned() else {
                continue;
            };
            if kind.namespaced {
                for stored in self.store.list(&resource, Some(namespace)) {
                    self.remove(&kind, &stored.value(), true, now);
                }
            }
        }
        self.finish_namespace(namespace, now);
    }

    fn is_empty(&self, namespace: &str) -> bool {
        let resources = self.store.resources().into_iter();
        resources
            .filter(|resource| resource != builtin::NAMESPACES)
            .all(|resource| self.store.list(&resource, Some(namespace)).is_empty())
    }

    /// A namespace that only waited for its last object goes with it.
    fn finish_namespace(&mut self, namespace: &str, now: &str) {
        let Some(stored) = self.store.get(builtin::NAMESPACES, "", namespace) else {
            return;
        };
        let value = stored.value();
        let going = object::at(&value, &["metadata", "deletionTimestamp"]).is_some();
        if going
            && self.is_empty(namespace)
            && let Some(kind) = self.catalog.of_resource(builtin::NAMESPACES).cloned()
        {
            self.remove(&kind, &value, true, now);
        }
    }

    /// A definition's objects go with it.
    fn drop_custom(&mut self, definition: &Value, now: &str) {
        for kind in crd::kinds(definition) {
            for stored in self.store.list(&kind.resource, None) {
                self.remove(&kind, &stored.value(), true, now);
            }
        }
        self.reload_catalog();
    }

    /// Who was owned by `uid` alone goes too.
    fn collect_dependents(&mut self, uid: &str, now: &str) {
        for stored in self.store.dependents(uid) {
            let Some(kind) = self.catalog.of_resource(&stored.0).cloned() else {
                continue;
            };
            let Some(value) = self
                .store
                .get(&stored.0, &stored.1.namespace, &stored.1.name)
                .map(|stored| stored.value())
            else {
                continue;
            };
            let owners = object::list(&value, &["metadata", "ownerReferences"]);
            let others = owners
                .iter()
                .filter_map(|owner| object::text(owner, &["uid"]))
                .any(|owner| owner != uid);
            if !others {
                self.remove(&kind, &value, false, now);
            }
        }
    }

    /// The object as `kind` shows it.
    ///
    /// # Errors
    ///
    /// 404.
    pub(crate) fn existing(&self, kind: &Kind, namespace: &str, name: &str) -> ApiResult<Value> {
        self.store
            .get(&kind.resource, namespace, name)
            .map(|stored| shown(kind, stored))
            .ok_or_else(|| ApiError::not_found(&kind.group, &kind.plural, name))
    }

    fn check_namespace(&self, kind: &Kind, namespace: &str) -> ApiResult<()> {
        if !kind.namespaced {
            return Ok(());
        }
        let Some(stored) = self.store.get(builtin::NAMESPACES, "", namespace) else {
            return Err(ApiError::not_found("", "namespaces", namespace));
        };
        if object::text(&stored.value(), &["status", "phase"]) == Some("Terminating") {
            return Err(ApiError::forbidden(format!(
                "unable to create new content in namespace {namespace} because it is being terminated"
            )));
        }
        Ok(())
    }

    fn free_name(&self, kind: &Kind, namespace: &str, prefix: &str) -> String {
        // 27^5 suffixes: the second turn is rare, and a hundredth means that all are taken.
        let mut name = String::new();
        for _ in 0..100 {
            name = format!("{prefix}{}", metadata::suffix());
            if self.store.get(&kind.resource, namespace, &name).is_none() {
                break;
            }
        }
        name
    }

    fn check_type(&self, kind: &Kind, value: &Value) -> ApiResult<()> {
        for (key, wanted) in [
            ("kind", kind.kind.clone()),
            ("apiVersion", kind.api_version()),
        ] {
            let got = object::text(value, &[key]).unwrap_or_default();
            if got.is_empty() && !kind.custom || got == wanted {
                continue;
            }
            return Err(ApiError::bad_request(format!(
                "the {key} in the data ({got:?}) does not match the expected {key} ({wanted:?})"
            )));
        }
        Ok(())
    }

    /// Reads a body as an object of `kind`: unknown fields go, with a word about them.
    fn read(&self, kind: &Kind, body: Body, options: &mut Options) -> ApiResult<Value> {
        let mut value = body.value;
        self.check_type(kind, &value)?;
        object::set(&mut value, &["kind"], kind.kind.as_str());
        object::set(&mut value, &["apiVersion"], kind.api_version());
        if !kind.custom {
            object::strip_nulls(&mut value);
        }
        let unknown = kind.schema.prune(&mut value, definitions());
        let unknown = unknown
            .iter()
            .map(|field| format!("unknown field {field:?}"));
        let twice = body.duplicates.iter();
        let said: Vec<_> = unknown
            .chain(twice.map(|field| format!("duplicate field {field:?}")))
            .collect();
        match options.validation {
            Validation::Strict if !said.is_empty() => Err(ApiError::bad_request(format!(
                "{} in version {:?} cannot be handled as a {}: strict decoding error: {}",
                kind.kind,
                kind.version,
                kind.kind,
                said.join(", ")
            ))),
            Validation::Warn => {
                options.warnings.extend(said);
                Ok(value)
            }
            Validation::Strict | Validation::Ignore => Ok(value),
        }
    }

    /// `new` in place of `old`, by the door of the object or of its status.
    fn replace(
        &mut self,
        kind: &Kind,
        old: Value,
        mut new: Value,
        place: Place<'_>,
        options: &mut Options,
        applied: bool,
    ) -> ApiResult<Value> {
        metadata::place(kind, &mut new, place.namespace, Some(place.name))?;
        check_version(kind, &old, &new)?;
        metadata::keep(&old, &mut new);
        if place.subresource == "status" {
            let managers = object::at(&new, &["metadata", "managedFields"]).cloned();
            let status = new.get("status").cloned();
            new = old.clone();
            match status {
                Some(status) => object::set(&mut new, &["status"], status),
                None => drop(object::remove(&mut new, &["status"])),
            }
            match managers {
                Some(managers) => object::set(&mut new, &["metadata", "managedFields"], managers),
                None => drop(object::remove(&mut new, &["metadata", "managedFields"])),
            }
        } else if kind.has_status {
            match old.get("status") {
                Some(status) => object::set(&mut new, &["status"], status.clone()),
                None => drop(object::remove(&mut new, &["status"])),
            }
        }
        self.write(kind, Some(old), new, place.subresource, options, applied)
    }

    /// The way that every write goes, from an object that is read to one that is kept.
    fn write(
        &mut self,
        kind: &Kind,
        old: Option<Value>,
        mut new: Value,
        subresource: &str,
        options: &mut Options,
        applied: bool,
    ) -> ApiResult<Value> {
        if old.is_none() {
            metadata::begin(kind, &mut new, &options.now);
            let keeps = options.with_status || kind.kind == "Node";
            if kind.has_status && !keeps {
                object::remove(&mut new, &["status"]);
            }
        }
        metadata::tidy(&mut new);
        kind.schema.fill_in(&mut new, definitions());
        self.fill_in(kind, old.as_ref(), &mut new, options)?;
        self.check(kind, old.as_ref(), &new, options)?;
        if !applied {
            let writer = writer(kind, subresource, options);
            let typed = Typed::new(&kind.schema, definitions());
            let nothing = json!({});
            let live = old.as_ref().unwrap_or(&nothing);
            apply::track_update(live, &mut new, &writer, typed, kind.has_status);
        }
        if let Some(old) = &old {
            if *old == new {
                return Ok(new);
            }
            metadata::count_generation(kind, old, &mut new);
        }
        let going = object::at(&new, &["metadata", "deletionTimestamp"]).is_some();
        let held = !object::list(&new, &["metadata", "finalizers"]).is_empty();
        if options.dry_run {
            return Ok(new);
        }
        let kept = self.keep(kind, new);
        if going && !held {
            return Ok(self.remove(kind, &kept, false, &options.now));
        }
        Ok(kept)
    }

    fn fill_in(
        &mut self,
        kind: &Kind,
        old: Option<&Value>,
        new: &mut Value,
        options: &Options,
    ) -> ApiResult<()> {
        if kind.custom {
            return Ok(());
        }
        builtin::fill_in(kind, new);
        if kind.kind == "Service" {
            let causes = self.pools.allocate(old, new);
            if !causes.is_empty() {
                return Err(invalid(kind, new, &causes));
            }
        }
        if kind.resource == crd::RESOURCE {
            crd::fill_in(new);
            let taken = self.taken_name(new);
            crd::establish(new, taken.as_deref(), &options.now);
        }
        Ok(())
    }

    fn check(
        &self,
        kind: &Kind,
        old: Option<&Value>,
        new: &Value,
        options: &Options,
    ) -> ApiResult<()> {
        let mut causes = metadata::check(kind, new);
        let wrong = kind.schema.check(new, old, definitions());
        let wrong_type = wrong
            .iter()
            .find(|cause| cause.reason == "FieldValueTypeInvalid");
        if let (Some(cause), false) = (wrong_type, kind.custom) {
            return Err(ApiError::bad_request(format!(
                "{} in version {:?} cannot be handled as a {}: json: cannot unmarshal: {}",
                kind.kind, kind.version, kind.kind, cause.message
            )));
        }
        // Built-in statuses are written by those who know them; what they lack is not an error.
        causes.extend(wrong.into_iter().filter(|cause| {
            kind.custom
                || !(cause.reason == "FieldValueRequired" && cause.field.starts_with("status"))
        }));
        if causes.is_empty() && !kind.custom {
            causes.extend(builtin::check(kind, old, new));
        }
        if kind.resource == crd::RESOURCE {
            causes.extend(crd::check(new));
        }
        if !causes.is_empty() {
            return Err(invalid(kind, new, &causes));
        }
        if kind.group == "rbac.authorization.k8s.io" {
            self.check_escalation(kind, new, options)?;
        }
        Ok(())
    }

    /// Nobody makes a role, or binds one, that says more than they may do themselves.
    fn check_escalation(&self, kind: &Kind, new: &Value, options: &Options) -> ApiResult<()> {
        let (user, namespace) = (&options.user, object::namespace(new));
        let binds = kind.kind.ends_with("Binding");
        let role = object::at(new, &["roleRef"]).unwrap_or(&Value::Null);
        let (verb, resource, name) = if binds {
            let resource = match object::text(role, &["kind"]) {
                Some("ClusterRole") => "clusterroles",
                _ => "roles",
            };
            (
                "bind",
                resource,
                object::text(role, &["name"]).unwrap_or_default(),
            )
        } else {
            ("escalate", kind.plural.as_str(), object::name(new))
        };
        let action = rbac::Action {
            verb: verb.to_owned(),
            group: kind.group.clone(),
            resource: resource.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            ..rbac::Action::default()
        };
        if rbac::allowed(&self.store, user, &action) {
            return Ok(());
        }
        let wanted = if binds {
            rbac::role_rules(&self.store, role, namespace)
        } else {
            object::list(new, &["rules"]).to_vec()
        };
        let held = rbac::rules(&self.store, user, namespace);
        match rbac::beyond(&held, &wanted) {
            None => Ok(()),
            Some(action) => Err(ApiError::forbidden(format!(
                "{}.{} {:?} is forbidden: user {:?} is attempting to grant RBAC permissions not \
                 currently held: {action:?}",
                kind.plural,
                kind.group,
                object::name(new),
                user.name
            ))),
        }
    }

    /// What of a definition's names another kind of its group has.
    fn taken_name(&self, definition: &Value) -> Option<String> {
        let group = object::text(definition, &["spec", "group"])?;
        let plural = object::text(definition, &["spec", "names", "plural"])?;
        let kind = object::text(definition, &["spec", "names", "kind"])?;
        let same_group = self.catalog.kinds.iter().filter(|one| one.group == group);
        let mut others = same_group.filter(|one| one.plural != plural);
        others.any(|one| one.kind == kind).then(|| kind.to_owned())
    }

    fn keep(&mut self, kind: &Kind, new: Value) -> Value {
        let stored = self.store.put(&kind.resource, events::stored(kind, new));
        let value = shown(kind, &stored);
        self.pools.take(kind, &value);
        if kind.resource == crd::RESOURCE {
            self.reload_catalog();
        }
        if kind.resource == builtin::NAMESPACES {
            self.furnish(object::name(&value));
        }
        value
    }

    /// What the controllers of a real cluster put into every namespace.
    fn furnish(&mut self, namespace: &str) {
        for object in builtin::furniture(namespace, &self.ca_pem) {
            let Some(kind) = self.catalog.of_object(&object).cloned() else {
                continue;
            };
            let there = self
                .store
                .get(&kind.resource, namespace, object::name(&object));
            if there.is_none() {
                let mut object = object;
                metadata::begin(&kind, &mut object, &metadata::now());
                self.store.put(&kind.resource, object);
            }
        }
    }

    fn reload_catalog(&mut self) {
        let mut catalog = Catalog::default();
        for stored in self.store.list(crd::RESOURCE, None) {
            catalog.kinds.extend(crd::kinds(&stored.value()));
        }
        self.catalog = catalog;
    }

    /// Puts an object as it comes, as a controller of the real server would: no schema, no rights.
    pub(crate) fn insert(&mut self, mut object: Value) -> ApiResult<Value> {
        let kind = self.catalog.of_object(&object).cloned().ok_or_else(|| {
            let kind = object::text(&object, &["kind"]).unwrap_or_default();
            ApiError::bad_request(format!("no kind {kind:?} is known"))
        })?;
        let namespace = object::namespace(&object).to_owned();
        if kind.namespaced {
            self.need_namespace(&namespace);
        }
        let old = self.existing(&kind, &namespace, object::name(&object)).ok();
        match &old {
            Some(old) => metadata::keep(old, &mut object),
            None => metadata::begin(&kind, &mut object, &metadata::now()),
        }
        kind.schema.fill_in(&mut object, definitions());
        if !kind.custom {
            builtin::fill_in(&kind, &mut object);
        }
        if kind.kind == "Service" {
            let causes = self.pools.allocate(old.as_ref(), &mut object);
            if !causes.is_empty() {
                return Err(invalid(&kind, &object, &causes));
            }
        }
        if let Some(old) = &old {
            metadata::count_generation(&kind, old, &mut object);
        }
        Ok(self.keep(&kind, object))
    }

    fn need_namespace(&mut self, namespace: &str) {
        if self.store.get(builtin::NAMESPACES, "", namespace).is_none() {
            let object = json!({
                "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace},
            });
            // A namespace's name alone is never refused here: nothing is checked.
            self.insert(object).map(drop).unwrap_or_default();
        }
    }
}

/// A stored object as `kind` shows it: another version of it, or another group's view of events.
pub(crate) fn shown(kind: &Kind, stored: &Arc<Stored>) -> Value {
    let mut value = stored.value();
    let version = kind.api_version();
    if object::text(&value, &["apiVersion"]) != Some(&version) {
        value = events::shown(kind, value);
        object::set(&mut value, &["apiVersion"], version);
    }
    value
}

/// An optimistic lock: whoever says a version must say the newest.
fn check_version(kind: &Kind, old: &Value, new: &Value) -> ApiResult<()> {
    let text = |value: &Value, key: &str| {
        let text = object::text(value, &["metadata", key]);
        text.unwrap_or_default().to_owned()
    };
    let name = object::name(old);
    let conflict = |why: &str| Err(ApiError::conflict(&kind.group, &kind.plural, name, why));
    let (version, uid) = (text(new, "resourceVersion"), text(new, "uid"));
    if !uid.is_empty() && uid != text(old, "uid") {
        let why = format!(
            "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
            text(old, "uid")
        );
        return conflict(&why);
    }
    if !version.is_empty() && version != text(old, "resourceVersion") {
        return conflict(
            "the object has been modified; please apply your changes to the latest version and try again",
        );
    }
    Ok(())
}

fn invalid(kind: &Kind, value: &Value, causes: &[Cause]) -> ApiError {
    let mut seen = BTreeSet::new();
    let causes: Vec<_> = causes
        .iter()
        .filter(|cause| seen.insert((cause.field.as_str(), cause.message.as_str())))
        .cloned()
        .collect();
    ApiError::invalid(&kind.group, &kind.kind, object::name(value), &causes)
}

fn writer(kind: &Kind, subresource: &str, options: &Options) -> Writer {
    Writer {
        manager: options.manager.clone(),
        version: kind.api_version(),
        subresource: subresource.to_owned(),
        now: options.now.clone(),
    }
}
