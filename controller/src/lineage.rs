//! Which of the generations that nodes have are this store's own, and which epoch counts.
//!
//! A store that was restored from a backup counts generations again that nodes have already, with something else in them. So
//! each life of the controller has a number chosen by chance, and the store knows up to which generation each life came: what
//! another life told, or the same one later, is lost here. Such a node is told nothing until an operator lets the older state count:
//! that is a new epoch.

/// Most lives that are remembered: three starts a day for a year. At 16 bytes, 16 KB. A node that has what an earlier one told is
/// compared with, as if it came from another controller.
const LIVES_MAX: usize = 1_000;

/// Before the first operator's word.
const FIRST_EPOCH: u64 = 1;

/// One life of a controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Life {
    number: u64,
    /// The generation with which it began.
    began: u64,
}

/// The lives of a store, the last one now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lineage {
    epoch: u64,
    lives: Vec<Life>,
}

/// What a node has, as far as this store knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A generation of this store.
    Known,
    /// None that it remembers: it has to be compared.
    Unknown,
    /// One that this store told, and lost.
    Lost,
}

/// What a node says of what it has of this store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Told {
    /// The life of the controller that told it; 0: an older agent, which does not know.
    pub life: u64,
    /// The epoch then.
    pub epoch: u64,
    /// The generation.
    pub generation: u64,
}

impl Default for Lineage {
    fn default() -> Self {
        Self {
            epoch: FIRST_EPOCH,
            lives: Vec::new(),
        }
    }
}

impl Lineage {
    /// Reads what [`Self::encode`] wrote; `None`: it did not.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (epoch, rest) = bytes.split_first_chunk::<8>()?;
        let (pairs, odd) = rest.as_chunks::<16>();
        let life = |pair: &[u8; 16]| {
            let (number, began) = pair.split_first_chunk::<8>()?;
            Some(Life {
                number: u64::from_be_bytes(*number),
                began: u64::from_be_bytes(*began.first_chunk()?),
            })
        };
        let lives: Option<Vec<_>> = pairs.iter().map(life).collect();
        odd.is_empty().then_some(Self {
            epoch: u64::from_be_bytes(*epoch),
            lives: lives?,
        })
    }

    /// For the disk.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.epoch.to_be_bytes().to_vec();
        for life in &self.lives {
            bytes.extend(life.number.to_be_bytes());
            bytes.extend(life.began.to_be_bytes());
        }
        bytes
    }

    /// A controller begins with what the store has. `number` is chosen by chance, and not 0.
    pub fn begin(&mut self, number: u64, generation: u64) {
        let excess = (self.lives.len() + 1).saturating_sub(LIVES_MAX);
        self.lives.drain(..excess);
        self.lives.push(Life {
            number,
            began: generation,
        });
    }

    /// Lets what the store has count again for nodes that have what it lost.
    pub fn accept_rollback(&mut self) {
        self.epoch += 1;
    }

    /// The epoch that counts.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The life now.
    #[must_use]
    pub fn life(&self) -> u64 {
        self.lives.last().map_or(0, |life| life.number)
    }

    /// What becomes of a node that says this of what it has of this store, which is at `generation`.
    #[must_use]
    pub fn place(&self, told: Told, generation: u64) -> Place {
        if told.life == 0 {
            return match told.generation <= generation {
                true => Place::Known,
                false => Place::Unknown,
            };
        }
        let found = self.lives.iter().position(|life| life.number == told.life);
        let next = found.map(|index| self.lives.get(index + 1));
        let ended = next.map(|next| next.map_or(generation, |next| next.began));
        match ended {
            Some(ended) if told.generation <= ended => Place::Known,
            _ if told.epoch < self.epoch => Place::Unknown,
            None if self.lives.len() >= LIVES_MAX => Place::Unknown,
            Some(_) | None => Place::Lost,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(life: u64, generation: u64) -> Told {
        Told {
            life,
            epoch: FIRST_EPOCH,
            generation,
        }
    }

    /// Life 7 from generation 0, life 8 from 100 on; now at 120.
    fn lineage() -> Lineage {
        let mut lineage = Lineage::default();
        lineage.begin(7, 0);
        lineage.begin(8, 100);
        lineage
    }

    #[test]
    fn what_this_store_told_is_known_and_what_a_lost_copy_told_is_lost() {
        let cases = [
            ("of this life", told(8, 120), Place::Known),
            ("of the life before", told(7, 100), Place::Known),
            ("an old one", told(7, 3), Place::Known),
            (
                "told by the life before after the backup was made",
                told(7, 101),
                Place::Lost,
            ),
            (
                "told by this life before its disk was set back",
                told(8, 121),
                Place::Lost,
            ),
            (
                "told by a life that the backup does not know",
                told(9, 110),
                Place::Lost,
            ),
            ("an older agent's", told(0, 120), Place::Known),
            ("an older agent's, lost", told(0, 121), Place::Unknown),
        ];
        for (name, told, expected) in cases {
            assert_eq!(lineage().place(told, 120), expected, "{name}");
        }
    }

    #[test]
    fn an_operator_s_word_lets_what_is_lost_be_compared() {
        let mut lineage = lineage();
        lineage.accept_rollback();
        assert_eq!(lineage.place(told(9, 110), 120), Place::Unknown);
        assert_eq!(lineage.place(told(8, 110), 120), Place::Known);
        let later = Told {
            epoch: lineage.epoch(),
            ..told(9, 110)
        };
        assert_eq!(lineage.place(later, 120), Place::Lost, "lost since then");
    }

    #[test]
    fn it_reads_back_and_other_bytes_do_not() {
        let lineage = lineage();
        let bytes = lineage.encode();
        assert_eq!(Lineage::decode(&bytes), Some(lineage));
        assert_eq!(Lineage::decode(&bytes[..bytes.len() - 1]), None);
        assert_eq!(Lineage::decode(&[1]), None);
    }

    #[test]
    fn lives_are_forgotten_beyond_a_limit_and_then_nobody_is_accused() {
        let mut lineage = Lineage::default();
        for life in 1..=LIVES_MAX as u64 + 5 {
            lineage.begin(life, life);
        }
        assert_eq!(lineage.lives.len(), LIVES_MAX);
        assert_eq!(lineage.place(told(2, 2), 2_000), Place::Unknown);
        assert_eq!(lineage.place(told(20, 21), 2_000), Place::Known);
    }
}
