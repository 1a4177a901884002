//! The controller's own file, that only root may read: what it published, and each manifest file as it
//! last was good. With one controller, what is shared otherwise is there too: the authority with its
//! key, the tokens' hashes, the nodes.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, ErrorKind::InvalidData},
    net::Ipv4Addr,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use mesh_api::control::{Resource, ResourceKey};
use mesh_identity::authority::{AuthorityError, CertificateAuthority};
use mesh_wire::id::{NodeId, NodeName};
use prost::Message as _;
use redb::{
    Database, DatabaseError, ReadTransaction, ReadableDatabase as _, ReadableTable as _,
    StorageError, TableDefinition, TransactionError, WriteTransaction,
};
use ring::rand::{SecureRandom as _, SystemRandom};
use zeroize::Zeroizing;

use crate::{
    history::{Entry, History, Step},
    lineage::Lineage,
    shared::{Change, Found, Key, Local, Seen, Shared, damaged, decode, decode_node, node_name},
    token::{Refusal, TOKENS_MAX, TokenRecord},
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
const MADE: &str = "made_unix_ms";
const LINEAGE: &str = "lineage";

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
    /// When it was taken out of the mesh, as Unix seconds: only its address is kept from others then.
    pub removed_unix_s: Option<i64>,
}

impl Registered {
    /// A node that is in the mesh.
    #[must_use]
    pub fn new(id: NodeId, overlay_v4: Ipv4Addr) -> Self {
        Self {
            id,
            overlay_v4,
            removed_unix_s: None,
        }
    }

    /// Whether it is in the mesh.
    #[must_use]
    pub fn is_in(&self) -> bool {
        self.removed_unix_s.is_none()
    }
}

/// Nodes by name.
pub type Nodes = BTreeMap<NodeName, Registered>;

/// What the store held when it was opened.
#[derive(Debug)]
pub struct Contents {
    /// Tells generations of this store from those of another.
    pub store_id: Vec<u8>,
    /// What was published.
    pub history: History,
    /// Which lives of controllers published it.
    pub lineage: Lineage,
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
    /// The file is no database, or not a whole one.
    #[error(
        "{} is damaged ({problem}): stop mesh-controller and put a backup of it there (docs/howto/backup.md)",
        path.display()
    )]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A record in it cannot be read.
    #[error("{place}: {what} is damaged")]
    Damaged {
        /// Which store.
        place: String,
        /// Which record.
        what: String,
    },
    /// The authority in it cannot be used.
    #[error("{place}: {source}")]
    Authority {
        /// Which store.
        place: String,
        /// Why.
        source: AuthorityError,
    },
    /// It belongs to another mesh.
    #[error("{place}: belongs to mesh {found}, but mesh_name is {expected}")]
    OtherMesh {
        /// Which store.
        place: String,
        /// The mesh in it.
        found: String,
        /// The configured one.
        expected: String,
    },
    /// Another authority is in force than the one that is here.
    #[error(
        "{place}: has another authority than {other}: nodes know only one of them. If what is in `state_dir` is of no use any more, empty it; if the mesh is to go on, start the controller that has the authority first, and alone"
    )]
    OtherAuthority {
        /// Which store.
        place: String,
        /// Where the other one is.
        other: String,
    },
    /// The system gave no random bytes.
    #[error("the system gave no random bytes")]
    Random,
    /// A store beyond the network did not answer, or not as it should.
    #[error("{place}: {problem}")]
    Remote {
        /// Which.
        place: String,
        /// Why.
        problem: String,
    },
    /// Others changed the same each time.
    #[error("{0}: other controllers change the same at the same time: try again")]
    Contended(String),
    /// Another node has the address that an operator chose for this one.
    #[error("the address {0} that was chosen for this node is another node's")]
    AddressTaken(Ipv4Addr),
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

/// The file in the folder.
pub const FILE: &str = "controller.redb";

/// The store. Every change is one transaction, on the disk when the method returns.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    /// `None` only between an I/O error and the next attempt.
    database: Option<Database>,
}

impl Store {
    /// Opens the store in `folder`, or makes it.
    ///
    /// # Errors
    ///
    /// [`StoreError`] with the file.
    pub fn open(folder: &Path) -> Result<(Self, Contents), StoreError> {
        make_private(folder)?;
        let mut store = Self {
            path: folder.join(FILE),
            database: None,
        };
        store.reopen()?;
        store.initialise()?;
        let contents = store.read()?;
        Ok((store, contents))
    }

    /// Writes a step of the history, remembers manifest files that are good now, and forgets those that are gone (`None`): all
    /// at once, as each transaction waits for the disk.
    ///
    /// # Errors
    ///
    /// The store failed.
    pub fn publish(
        &mut self,
        step: Option<&Step>,
        files: &BTreeMap<String, Option<String>>,
    ) -> Result<(), StoreError> {
        if step.is_none() && files.is_empty() {
            return Ok(());
        }
        self.write(|transaction| {
            write_manifests(transaction, files)?;
            step.map_or(Ok(()), |step| write_step(transaction, step))
        })
    }

    /// Writes a life that begins, or an epoch.
    ///
    /// # Errors
    ///
    /// The store failed.
    pub fn save_lineage(&mut self, lineage: &Lineage) -> Result<(), StoreError> {
        let bytes = lineage.encode();
        self.write(|transaction| {
            let mut meta = transaction.open_table(META)?;
            meta.insert(LINEAGE, bytes.as_slice())?;
            Ok(())
        })
    }

    fn initialise(&mut self) -> Result<(), StoreError> {
        let mut store_id = [0; 16];
        let filled = SystemRandom::new().fill(&mut store_id);
        filled.map_err(|_| StoreError::Random)?;
        self.write(|transaction| {
            // So that reading need not ask which tables there are.
            transaction.open_table(TOKENS)?;
            transaction.open_table(NODES)?;
            transaction.open_table(RESOURCES)?;
            transaction.open_table(MANIFESTS)?;
            let mut meta = transaction.open_table(META)?;
            if meta.get(STORE_ID)?.is_none() {
                meta.insert(STORE_ID, store_id.as_slice())?;
            }
            Ok(())
        })
    }

    fn read(&mut self) -> Result<Contents, StoreError> {
        let place = self.place();
        let mut meta = self.meta()?;
        let number = |what: &str| match meta.get(what) {
            None => Ok(0),
            Some(raw) => <[u8; 8]>::try_from(raw.as_slice())
                .map(u64::from_be_bytes)
                .map_err(|_| damaged(&place, what)),
        };
        let (generation, floor) = (number(GENERATION)?, number(FLOOR)?);
        let made_unix_ms = number(MADE)?;
        let lineage = match meta.get(LINEAGE) {
            None => Lineage::default(),
            Some(raw) => Lineage::decode(raw).ok_or_else(|| damaged(&place, LINEAGE))?,
        };
        let entries = self.read_resources()?;
        Ok(Contents {
            store_id: meta.remove(STORE_ID).unwrap_or_default(),
            history: History::restore(generation, floor, made_unix_ms, entries),
            lineage,
            manifests: self.read_manifests()?,
        })
    }

    fn meta(&mut self) -> Result<BTreeMap<String, Vec<u8>>, StoreError> {
        Ok(self.rows(META)?.into_iter().collect())
    }

    fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn read_resources(&mut self) -> Result<BTreeMap<ResourceKey, Entry>, StoreError> {
        let (path, place) = (self.path.clone(), self.place());
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
                .map_err(|_| damaged(&place, name))?;
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
            } else if let Some(problem) = broken(&error) {
                let path = path.clone();
                StoreError::Broken { path, problem }
            } else {
                storage(path, error.into())
            }
        })?;
        self.database = Some(database);
        Ok(())
    }
}

fn write_step(transaction: &WriteTransaction, step: &Step) -> Result<(), redb::Error> {
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
    meta.insert(MADE, step.made_unix_ms.to_be_bytes().as_slice())?;
    Ok(())
}

fn write_manifests(
    transaction: &WriteTransaction,
    files: &BTreeMap<String, Option<String>>,
) -> Result<(), redb::Error> {
    let mut table = transaction.open_table(MANIFESTS)?;
    for (name, text) in files {
        match text {
            Some(text) => table.insert(name.as_str(), text.as_str())?,
            None => table.remove(name.as_str())?,
        };
    }
    Ok(())
}

/// The embedded store: what controllers share, where there is only one.
#[derive(Debug)]
pub struct Embedded {
    store: Arc<Mutex<Store>>,
}

impl Embedded {
    /// In `store`, which keeps what was published too.
    #[must_use]
    pub fn new(store: Arc<Mutex<Store>>) -> Self {
        Self { store }
    }

    /// What is in it; `None`: nothing yet, or it was [forgotten](Self::forget).
    ///
    /// # Errors
    ///
    /// The store failed.
    pub fn local(&mut self) -> Result<Option<Local>, StoreError> {
        let place = self.place();
        let Some(authority) = read_authority(&place, self.store().meta()?)? else {
            return Ok(None);
        };
        Ok(Some(Local {
            authority,
            nodes: self.nodes()?.0,
            tokens: self.tokens()?,
        }))
    }

    /// Forgets all that is shared elsewhere now.
    ///
    /// # Errors
    ///
    /// The store failed.
    pub fn forget(&mut self) -> Result<(), StoreError> {
        self.store().write(|transaction| {
            let mut meta = transaction.open_table(META)?;
            meta.remove(AUTHORITY_CERTIFICATE)?;
            meta.remove(AUTHORITY_KEY)?;
            for table in [NODES, TOKENS] {
                transaction.open_table(table)?.retain(|_, _| false)?;
            }
            Ok(())
        })
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared for Embedded {
    fn place(&self) -> String {
        self.store().place()
    }

    fn authority(
        &mut self,
        proposed: &CertificateAuthority,
    ) -> Result<CertificateAuthority, StoreError> {
        let mut store = self.store();
        let place = store.place();
        store.write(|transaction| {
            let mut meta = transaction.open_table(META)?;
            if meta.get(AUTHORITY_CERTIFICATE)?.is_none() {
                let (certificate, key) = (proposed.certificate_pem(), proposed.key_pem());
                meta.insert(AUTHORITY_CERTIFICATE, certificate.as_bytes())?;
                meta.insert(AUTHORITY_KEY, key.as_bytes())?;
            }
            Ok(())
        })?;
        let authority = read_authority(&place, store.meta()?)?;
        authority.ok_or_else(|| damaged(&place, "the authority's certificate"))
    }

    fn nodes(&mut self) -> Result<(Nodes, u64), StoreError> {
        let mut store = self.store();
        let place = store.place();
        let rows = store.rows(NODES)?.into_iter();
        let nodes = rows.map(|(name, raw)| {
            let name = node_name(&place, name.as_bytes())?;
            let node = decode_node(&place, &name, &raw)?;
            Ok((name, node))
        });
        Ok((nodes.collect::<Result<_, StoreError>>()?, 0))
    }

    fn tokens(&mut self) -> Result<Vec<(String, TokenRecord)>, StoreError> {
        let mut store = self.store();
        let place = store.place();
        let rows = store.rows(TOKENS)?.into_iter();
        rows.map(|(id, raw)| Ok((id, decode(&place, "a token", &raw)?)))
            .collect()
    }

    fn get(&mut self, keys: &[Key]) -> Result<Vec<Option<Found>>, StoreError> {
        let mut store = self.store();
        let path = store.path.clone();
        let transaction = store.begin_read()?;
        let read = |key: &Key| -> Result<Option<Found>, redb::Error> {
            let Some((table, row)) = row(key) else {
                return Ok(None);
            };
            let table = transaction.open_table(table)?;
            let found = table.get(row)?.map(|raw| Found {
                value: raw.value().to_vec(),
                revision: 0,
            });
            Ok(found)
        };
        let found = keys.iter().map(read);
        found
            .collect::<Result<_, _>>()
            .map_err(|error| storage(&path, error))
    }

    fn commit(&mut self, seen: &[Seen], changes: &[Change]) -> Result<Option<u64>, StoreError> {
        let mut store = self.store();
        let path = store.path.clone();
        let transaction = store.begin()?;
        let work = || -> Result<bool, redb::Error> {
            for (key, found) in seen {
                let Some((table, row)) = row(key) else {
                    continue;
                };
                let table = transaction.open_table(table)?;
                let now = table.get(row)?;
                let now = now.as_ref().map(|raw| raw.value());
                if now != found.as_ref().map(|found| found.value.as_slice()) {
                    return Ok(false);
                }
            }
            for (key, value) in changes {
                let Some((table, row)) = row(key) else {
                    continue;
                };
                let mut table = transaction.open_table(table)?;
                match value {
                    Some(value) => table.insert(row, value.as_slice())?,
                    None => table.remove(row)?,
                };
            }
            Ok(true)
        };
        let done = work();
        let done = done.and_then(|done| {
            if done {
                transaction.commit()?;
            }
            Ok(done.then_some(0))
        });
        done.map_err(|error| storage(&path, error))
    }
}

fn read_authority(
    place: &str,
    mut meta: BTreeMap<String, Vec<u8>>,
) -> Result<Option<CertificateAuthority>, StoreError> {
    let key = Zeroizing::new(meta.remove(AUTHORITY_KEY).unwrap_or_default());
    let Some(certificate) = meta.remove(AUTHORITY_CERTIFICATE) else {
        return Ok(None);
    };
    let text =
        |what, bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|_| damaged(place, what));
    let certificate = text("the authority's certificate", &certificate)?;
    let key = Zeroizing::new(text("the authority's key", &key)?);
    let authority = CertificateAuthority::from_pem(&certificate, &key);
    let place = place.to_owned();
    authority
        .map(Some)
        .map_err(|source| StoreError::Authority { place, source })
}

/// Where `key` stands. Whose an address or a WireGuard key is follows from the nodes, and nobody else
/// gives them away.
fn row(key: &Key) -> Option<(TableDefinition<'static, &'static str, &'static [u8]>, &str)> {
    match key {
        Key::Token(id) => Some((TOKENS, id.as_str())),
        Key::Node(name) => Some((NODES, name.as_str())),
        Key::Address(_) | Key::PublicKey(_) => None,
    }
}

fn make_private(folder: &Path) -> Result<(), StoreError> {
    let mut builder = fs::DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(folder);
    made.map_err(|source| StoreError::Path {
        path: folder.to_owned(),
        source,
    })
}

/// What is wrong with a file that is no database, or is not whole: trying again does not help.
fn broken(error: &DatabaseError) -> Option<String> {
    let DatabaseError::Storage(error) = error else {
        return None;
    };
    if let StorageError::Corrupted(problem) = error {
        return Some(problem.clone());
    }
    if let StorageError::Io(problem) = error
        && problem.kind() == InvalidData
    {
        return Some(problem.to_string());
    }
    None
}

fn storage(path: &Path, source: redb::Error) -> StoreError {
    StoreError::Storage {
        path: path.to_owned(),
        source: Box::new(source),
    }
}
