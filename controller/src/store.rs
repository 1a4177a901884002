//! The embedded store: one file that only root may read. It holds the authority with its key,
//! the tokens' hashes, the nodes, what was published, and each manifest file as it last was good.

use std::{
    collections::BTreeMap,
    fs, io,
    net::Ipv4Addr,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use mesh_api::control::{Resource, ResourceKey};
use mesh_identity::authority::{AuthorityError, CertificateAuthority};
use mesh_wire::id::{NodeId, NodeName};
use prost::Message as _;
use redb::{
    Database, DatabaseError, ReadTransaction, ReadableDatabase as _, ReadableTable as _,
    StorageError, Table, TableDefinition, TransactionError, WriteTransaction,
};
use ring::rand::{SecureRandom as _, SystemRandom};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use zeroize::Zeroizing;

use crate::{
    history::{Entry, History, Step},
    token::{Applicant, REMEMBER_S, Refusal, TOKENS_MAX, TokenRecord},
};

const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const TOKENS: TableDefinition<&str, &[u8]> = TableDefinition::new("tokens");
const NODES: TableDefinition<&str, &[u8]> = TableDefinition::new("nodes");
const RESOURCES: TableDefinition<(i32, &str), (u64, &[u8])> = TableDefinition::new("resources");
const MANIFESTS: TableDefinition<&str, &str> = TableDefinition::new("manifests");

const AUTHORITY_CERTIFICATE: &str = "authority_certificate";
const AUTHORITY_KEY: &str = "authority_key";
const STORE_ID: &str = "store_id";
const GENERATION: &str = "generation";
const FLOOR: &str = "floor";

/// What the database may keep in memory besides what the controller itself has there: enough for the pages of one
/// step. (Its own default is a gigabyte.)
const CACHE_BYTES: usize = 16 << 20;

/// A node that joined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registered {
    /// Its WireGuard key.
    pub id: NodeId,
    /// The address that it was given.
    pub overlay_v4: Ipv4Addr,
}

/// Nodes by name.
pub type Nodes = BTreeMap<NodeName, Registered>;

/// What the store held when it was opened.
#[derive(Debug)]
pub struct Contents {
    /// The mesh's authority.
    pub authority: CertificateAuthority,
    /// Tells generations of this store from those of another.
    pub store_id: Vec<u8>,
    /// Nodes that joined.
    pub nodes: Nodes,
    /// What was published.
    pub history: History,
    /// Each manifest file's text when it last was good, by its name.
    pub manifests: BTreeMap<String, String>,
}

/// What is wrong with the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder or the file cannot be made.
    #[error("{}: {source}", path.display())]
    Path {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process has it.
    #[error("{}: another controller uses this store", .0.display())]
    InUse(PathBuf),
    /// Reading or writing failed.
    #[error("{}: {source}", path.display())]
    Storage {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<redb::Error>,
    },
    /// A record in it cannot be read.
    #[error("{}: {what} is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Which record.
        what: String,
    },
    /// The authority in it cannot be used.
    #[error("{}: {source}", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// Why.
        source: AuthorityError,
    },
    /// It belongs to another mesh.
    #[error("{}: belongs to mesh {found}, but mesh_name is {expected}", path.display())]
    OtherMesh {
        /// The file.
        path: PathBuf,
        /// The mesh in it.
        found: String,
        /// The configured one.
        expected: String,
    },
    /// The system gave no random bytes.
    #[error("the system gave no random bytes")]
    Random,
    /// There are too many tokens.
    #[error("there are {TOKENS_MAX} tokens already: revoke some")]
    TokensFull,
}

/// Why a join did not happen. Nothing was written then.
#[derive(Debug, thiserror::Error)]
pub enum JoinError<E> {
    /// It is not allowed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The caller could not make a place or a certificate.
    #[error("{0}")]
    Prepare(E),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[derive(Debug, Serialize, Deserialize)]
struct NodeRecord {
    public_key: String,
    overlay_v4: Ipv4Addr,
}

/// The store. Every change is one transaction, on the disk when the method returns.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    /// `None` only between an I/O error and the next attempt.
    database: Option<Database>,
}

impl Store {
    /// Opens the store in `folder`, or makes it with a new authority for `mesh_name`.
    ///
    /// # Errors
    ///
    /// [`StoreError`] with the file.
    pub fn open(
        folder: &Path,
        mesh_name: &str,
        now: SystemTime,
    ) -> Result<(Self, Contents), StoreError> {
        make_private(folder)?;
        let mut store = Self {
            path: folder.join("controller.redb"),
            database: None,
        };
        store.reopen()?;
        store.initialise(mesh_name, now)?;
        let contents = store.read()?;
        let found = contents.authority.trust_domain();
        if found != mesh_name {
            return Err(StoreError::OtherMesh {
                path: store.path,
                found: found.to_owned(),
                expected: mesh_name.to_owned(),
            });
        }
        Ok((store, contents))
    }

    /// Adds a token; forgets those that expired long ago.
    ///
    /// # Errors
    ///
    /// [`StoreError::TokensFull`], or the store failed.
    pub fn create_token(
        &mut self,
        id: &str,
        token: &TokenRecord,
        now_unix_s: i64,
    ) -> Result<(), StoreError> {
        let tokens = self.tokens()?;
        let (old, kept): (Vec<_>, Vec<_>) = tokens
            .into_iter()
            .partition(|(_, token)| token.expires_unix_s + REMEMBER_S < now_unix_s);
        if kept.len() >= TOKENS_MAX {
            return Err(StoreError::TokensFull);
        }
        self.write(|transaction| {
            let mut table = transaction.open_table(TOKENS)?;
            for (id, _) in &old {
                table.remove(id.as_str())?;
            }
            table.insert(id, encode(token).as_slice())?;
            Ok(())
        })
    }

    /// Every token, by its id.
    ///
    /// # Errors
    ///
    /// The store failed.
    pub fn tokens(&mut self) -> Result<Vec<(String, TokenRecord)>, StoreError> {
        let path = self.path.clone();
        let raw = self.rows(TOKENS)?;
        raw.into_iter()
            .map(|(id, bytes)| {
                let token = decode(&path, "a token", &bytes)?;
                Ok((id, token))
            })
            .collect()
    }

    /// Removes a token; `false`: there was none.
    ///
    /// # Errors
    ///
    /// The store failed.
    pub fn revoke_token(&mut self, id: &str) -> Result<bool, StoreError> {
        self.write(|transaction| {
            let mut table = transaction.open_table(TOKENS)?;
            let removed = table.remove(id)?;
            Ok(removed.is_some())
        })
    }

    /// Lets `applicant` in by the token `token_id`, or not: the token's use and the node's
    /// registration are one transaction. `prepare` gives its overlay address and whatever the
    /// answer needs; if that fails, no use is lost.
    ///
    /// # Errors
    ///
    /// [`JoinError`]; nothing was written then.
    pub fn join<T, E>(
        &mut self,
        token_id: &str,
        applicant: &Applicant,
        now_unix_s: i64,
        prepare: impl FnOnce(Option<&Registered>) -> Result<(Ipv4Addr, T), E>,
    ) -> Result<(Registered, T), JoinError<E>> {
        let path = self.path.clone();
        let storage = |error: redb::Error| JoinError::Store(storage(&path, error));
        let transaction = self.begin()?;
        let name = applicant.name.as_str();
        let placed = {
            let mut tokens = transaction
                .open_table(TOKENS)
                .map_err(|e| storage(e.into()))?;
            let mut nodes = transaction
                .open_table(NODES)
                .map_err(|e| storage(e.into()))?;
            let raw = tokens.get(token_id).map_err(|e| storage(e.into()))?;
            let raw = raw
                .map(|raw| raw.value().to_vec())
                .ok_or(Refusal::Unknown)?;
            let mut token: TokenRecord = decode(&path, "a token", &raw)?;
            let before = registered_as(&path, &nodes, name)?;
            token.admit(applicant, before.as_ref().map(|node| node.id), now_unix_s)?;
            let placed = place(&mut nodes, name, applicant.id, before, prepare)
                .map_err(|error| in_store(&path, error))?;
            let inserted = tokens.insert(token_id, encode(&token).as_slice());
            inserted.map_err(|e| storage(e.into()))?;
            placed
        };
        transaction.commit().map_err(|e| storage(e.into()))?;
        Ok(placed)
    }

    /// Lets a node in for which somebody else vouches, with whatever key it has now.
    ///
    /// # Errors
    ///
    /// [`JoinError`]; nothing was written then.
    pub fn enroll<T, E>(
        &mut self,
        name: &NodeName,
        id: NodeId,
        prepare: impl FnOnce(Option<&Registered>) -> Result<(Ipv4Addr, T), E>,
    ) -> Result<(Registered, T), JoinError<E>> {
        let path = self.path.clone();
        let storage = |error: redb::Error| JoinError::Store(storage(&path, error));
        let transaction = self.begin()?;
        let placed = {
            let nodes = transaction.open_table(NODES);
            let mut nodes = nodes.map_err(|e| storage(e.into()))?;
            let before = registered_as(&path, &nodes, name.as_str())?;
            place(&mut nodes, name.as_str(), id, before, prepare)
                .map_err(|error| in_store(&path, error))?
        };
        transaction.commit().map_err(|e| storage(e.into()))?;
        Ok(placed)
    }

    /// Writes a step of the history.
    ///
    /// # Errors
    ///
    /// The store failed.
    pub fn publish(&mut self, step: &Step) -> Result<(), StoreError> {
        self.write(|transaction| {
            let mut table = transaction.open_table(RESOURCES)?;
            for key in &step.forgotten {
                table.remove((key.kind, key.name.as_str()))?;
            }
            for (key, entry) in &step.changed {
                let resource = entry.resource.as_deref();
                let bytes = resource.map(Resource::encode_to_vec).unwrap_or_default();
                let value = (entry.generation, bytes.as_slice());
                table.insert((key.kind, key.name.as_str()), value)?;
            }
            let mut meta = transaction.open_table(META)?;
            meta.insert(GENERATION, step.generation.to_be_bytes().as_slice())?;
            meta.insert(FLOOR, step.floor.to_be_bytes().as_slice())?;
            Ok(())
        })
    }

    /// Remembers manifest files that are good now, and forgets those that are gone (`None`).
    ///
    /// # Errors
    ///
    /// The store failed.
    pub fn save_manifests(
        &mut self,
        files: &BTreeMap<String, Option<String>>,
    ) -> Result<(), StoreError> {
        self.write(|transaction| {
            let mut table = transaction.open_table(MANIFESTS)?;
            for (name, text) in files {
                match text {
                    Some(text) => table.insert(name.as_str(), text.as_str())?,
                    None => table.remove(name.as_str())?,
                };
            }
            Ok(())
        })
    }

    fn initialise(&mut self, mesh_name: &str, now: SystemTime) -> Result<(), StoreError> {
        let path = self.path.clone();
        let mut store_id = [0; 16];
        let filled = SystemRandom::new().fill(&mut store_id);
        filled.map_err(|_| StoreError::Random)?;
        let authority = CertificateAuthority::generate(mesh_name, now)
            .map_err(|source| StoreError::Authority { path, source })?;
        let key = authority.key_pem();
        self.write(|transaction| {
            // So that reading need not ask which tables there are.
            transaction.open_table(TOKENS)?;
            transaction.open_table(NODES)?;
            transaction.open_table(RESOURCES)?;
            transaction.open_table(MANIFESTS)?;
            let mut meta = transaction.open_table(META)?;
            if meta.get(STORE_ID)?.is_none() {
                meta.insert(STORE_ID, store_id.as_slice())?;
                let certificate = authority.certificate_pem();
                meta.insert(AUTHORITY_CERTIFICATE, certificate.as_bytes())?;
                meta.insert(AUTHORITY_KEY, key.as_bytes())?;
            }
            Ok(())
        })
    }

    fn read(&mut self) -> Result<Contents, StoreError> {
        let path = self.path.clone();
        let mut meta: BTreeMap<_, _> = self.rows(META)?.into_iter().collect();
        let key = Zeroizing::new(meta.remove(AUTHORITY_KEY).unwrap_or_default());
        let text = |what, bytes: &[u8]| {
            String::from_utf8(bytes.to_vec()).map_err(|_| damaged(&path, what))
        };
        let certificate = meta.remove(AUTHORITY_CERTIFICATE).unwrap_or_default();
        let certificate = text("the authority's certificate", &certificate)?;
        let key = Zeroizing::new(text("the authority's key", &key)?);
        let authority = CertificateAuthority::from_pem(&certificate, &key);
        let authority = authority.map_err(|source| StoreError::Authority {
            path: path.clone(),
            source,
        })?;
        let number = |what: &str| match meta.get(what) {
            None => Ok(0),
            Some(raw) => <[u8; 8]>::try_from(raw.as_slice())
                .map(u64::from_be_bytes)
                .map_err(|_| damaged(&path, what)),
        };
        let (generation, floor) = (number(GENERATION)?, number(FLOOR)?);
        let mut nodes = Nodes::new();
        for (name, raw) in self.rows(NODES)? {
            let node = decode_node(&path, &name, &raw)?;
            let name = name.parse().map_err(|_| damaged(&path, "a node's name"))?;
            nodes.insert(name, node);
        }
        let entries = self.read_resources()?;
        Ok(Contents {
            authority,
            store_id: meta.remove(STORE_ID).unwrap_or_default(),
            nodes,
            history: History::restore(generation, floor, entries),
            manifests: self.read_manifests()?,
        })
    }

    fn read_resources(&mut self) -> Result<BTreeMap<ResourceKey, Entry>, StoreError> {
        let path = self.path.clone();
        let storage = |error: redb::Error| storage(&path, error);
        let transaction = self.begin_read()?;
        let table = transaction
            .open_table(RESOURCES)
            .map_err(|e| storage(e.into()))?;
        let mut entries = BTreeMap::new();
        for row in table.iter().map_err(|e| storage(e.into()))? {
            let (key, value) = row.map_err(|e| storage(e.into()))?;
            let ((kind, name), (generation, bytes)) = (key.value(), value.value());
            let resource = (!bytes.is_empty())
                .then(|| Resource::decode(bytes).map(Arc::new))
                .transpose()
                .map_err(|_| damaged(&path, name))?;
            let name = name.to_owned();
            entries.insert(
                ResourceKey { kind, name },
                Entry {
                    generation,
                    resource,
                },
            );
        }
        Ok(entries)
    }

    fn read_manifests(&mut self) -> Result<BTreeMap<String, String>, StoreError> {
        let path = self.path.clone();
        let storage = |error: redb::Error| storage(&path, error);
        let transaction = self.begin_read()?;
        let table = transaction
            .open_table(MANIFESTS)
            .map_err(|e| storage(e.into()))?;
        let rows = table.iter().map_err(|e| storage(e.into()))?;
        rows.map(|row| {
            let (name, text) = row.map_err(|e| storage(e.into()))?;
            Ok((name.value().to_owned(), text.value().to_owned()))
        })
        .collect()
    }

    fn rows(
        &mut self,
        table: TableDefinition<&str, &[u8]>,
    ) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let path = self.path.clone();
        let storage = |error: redb::Error| storage(&path, error);
        let transaction = self.begin_read()?;
        let table = transaction
            .open_table(table)
            .map_err(|e| storage(e.into()))?;
        let rows = table.iter().map_err(|e| storage(e.into()))?;
        rows.map(|row| {
            let (key, value) = row.map_err(|e| storage(e.into()))?;
            Ok((key.value().to_owned(), value.value().to_vec()))
        })
        .collect()
    }

    fn write<T>(
        &mut self,
        work: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let transaction = self.begin()?;
        let done = work(&transaction);
        let done = done.and_then(|value| {
            transaction.commit()?;
            Ok(value)
        });
        done.map_err(|error| storage(&self.path, error))
    }

    /// After an I/O error (a full disk) redb wants the file closed and opened again.
    fn begin(&mut self) -> Result<WriteTransaction, StoreError> {
        let begun = self.database()?.begin_write();
        let begun = match begun {
            Err(TransactionError::Storage(StorageError::PreviousIo)) => {
                self.reopen()?;
                self.database()?.begin_write()
            }
            other => other,
        };
        begun.map_err(|error| storage(&self.path, error.into()))
    }

    fn begin_read(&mut self) -> Result<ReadTransaction, StoreError> {
        let begun = match self.database()?.begin_read() {
            Err(TransactionError::Storage(StorageError::PreviousIo)) => {
                self.reopen()?;
                self.database()?.begin_read()
            }
            other => other,
        };
        begun.map_err(|error| storage(&self.path, error.into()))
    }

    fn database(&mut self) -> Result<&Database, StoreError> {
        if self.database.is_none() {
            self.reopen()?;
        }
        // `reopen` filled it, or returned.
        self.database
            .as_ref()
            .ok_or_else(|| StoreError::InUse(self.path.clone()))
    }

    fn reopen(&mut self) -> Result<(), StoreError> {
        self.database = None;
        let path = &self.path;
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path);
        let private = file.and_then(|file| file.set_permissions(fs::Permissions::from_mode(0o600)));
        private.map_err(|source| StoreError::Path {
            path: path.clone(),
            source,
        })?;
        let mut builder = Database::builder();
        let database = builder.set_cache_size(CACHE_BYTES).create(path);
        let database = database.map_err(|error| {
            if matches!(error, DatabaseError::DatabaseAlreadyOpen) {
                StoreError::InUse(path.clone())
            } else {
                storage(path, error.into())
            }
        })?;
        self.database = Some(database);
        Ok(())
    }
}

fn registered_as(
    path: &Path,
    nodes: &Table<&'static str, &'static [u8]>,
    name: &str,
) -> Result<Option<Registered>, StoreError> {
    let raw = nodes.get(name);
    let raw = raw.map_err(|error| storage(path, error.into()))?;
    raw.map(|raw| decode_node(path, name, raw.value()))
        .transpose()
}

/// Why a node got no place.
enum PlaceError<E> {
    Prepare(E),
    Storage(StorageError),
}

fn in_store<E>(path: &Path, error: PlaceError<E>) -> JoinError<E> {
    match error {
        PlaceError::Prepare(error) => JoinError::Prepare(error),
        PlaceError::Storage(error) => JoinError::Store(storage(path, error.into())),
    }
}

fn place<T, E>(
    nodes: &mut Table<&'static str, &'static [u8]>,
    name: &str,
    id: NodeId,
    before: Option<Registered>,
    prepare: impl FnOnce(Option<&Registered>) -> Result<(Ipv4Addr, T), E>,
) -> Result<(Registered, T), PlaceError<E>> {
    let (overlay_v4, prepared) = prepare(before.as_ref()).map_err(PlaceError::Prepare)?;
    let record = NodeRecord {
        public_key: id.to_string(),
        overlay_v4,
    };
    nodes
        .insert(name, encode(&record).as_slice())
        .map_err(PlaceError::Storage)?;
    Ok((Registered { id, overlay_v4 }, prepared))
}

fn make_private(folder: &Path) -> Result<(), StoreError> {
    let mut builder = fs::DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(folder);
    made.map_err(|source| StoreError::Path {
        path: folder.to_owned(),
        source,
    })
}

fn encode(value: &impl Serialize) -> Vec<u8> {
    // Strings, numbers and arrays of them: there is nothing that JSON cannot hold.
    serde_json::to_vec(value).unwrap_or_default()
}

fn decode<T: DeserializeOwned>(path: &Path, what: &str, bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|_| damaged(path, what))
}

fn decode_node(path: &Path, name: &str, bytes: &[u8]) -> Result<Registered, StoreError> {
    let record: NodeRecord = decode(path, name, bytes)?;
    let id = record.public_key.parse();
    Ok(Registered {
        id: id.map_err(|_| damaged(path, name))?,
        overlay_v4: record.overlay_v4,
    })
}

fn damaged(path: &Path, what: &str) -> StoreError {
    StoreError::Damaged {
        path: path.to_owned(),
        what: what.to_owned(),
    }
}

fn storage(path: &Path, source: redb::Error) -> StoreError {
    StoreError::Storage {
        path: path.to_owned(),
        source: Box::new(source),
    }
}
