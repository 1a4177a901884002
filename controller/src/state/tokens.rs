//! The tokens by which nodes join.

use mesh_identity::token::{JoinToken, NoRandomness};
use mesh_wire::id::NodeName;

use super::{State, lock};
use crate::{
    shared,
    store::StoreError,
    token::{DEFAULT_TTL_S, TTL_S_MAX, TokenRecord, USES_MAX},
};

/// Why no token was made.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It would be valid too long.
    #[error("a token is valid for at most {TTL_S_MAX} seconds")]
    TooLong,
    /// It would have too many uses.
    #[error("a token has at most {USES_MAX} uses")]
    TooManyUses,
    /// No randomness.
    #[error(transparent)]
    Random(#[from] NoRandomness),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl State {
    /// Makes a token. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// [`TokenError`].
    pub fn create_token(
        &self,
        ttl_s: u64,
        uses: u32,
        description: String,
        node: Option<NodeName>,
    ) -> Result<(JoinToken, i64), TokenError> {
        let ttl_s = if ttl_s == 0 { DEFAULT_TTL_S } else { ttl_s };
        let ttl = i64::try_from(ttl_s).ok().filter(|_| ttl_s <= TTL_S_MAX);
        let ttl = ttl.ok_or(TokenError::TooLong)?;
        if uses > USES_MAX {
            return Err(TokenError::TooManyUses);
        }
        let token = JoinToken::generate(&self.settings.mesh_name, self.authority.mesh_id())?;
        let now = self.now_unix_s();
        let record = TokenRecord {
            secret_hash: token.secret_hash(),
            description,
            expires_unix_s: now + ttl,
            uses_left: uses.max(1),
            node: node.map(String::from),
            used_by: Vec::new(),
        };
        let mut shared = lock(&self.shared);
        shared::create_token(shared.as_mut(), &token.id, &record, now)?;
        drop(shared);
        Ok((token, record.expires_unix_s))
    }

    /// Every token. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// The store failed.
    pub fn tokens(&self) -> Result<Vec<(String, TokenRecord)>, StoreError> {
        lock(&self.shared).tokens()
    }

    /// Removes a token; `false`: there was none. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// The store failed.
    pub fn revoke_token(&self, id: &str) -> Result<bool, StoreError> {
        shared::revoke_token(lock(&self.shared).as_mut(), id)
    }
}
