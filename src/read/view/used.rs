//! WAL by which a server on a view, or on a copy of it by any tool, would write to another server's tablespace.
//!
//! Replay makes a tablespace at the path that it has on the source. So a file of WAL that creates one where another server has its
//! files is refused when it is opened. An error of `open` is a PANIC, after which the server does not start; an error of `read`
//! would be the end of WAL, where recovery ends in silence.

use std::sync::Arc;

use super::once::Once;
use super::{NodeIndex, View};
use crate::error::{Context, Error, Result};
use crate::format::manifest::Description;
use crate::postgres::{Lsn, SegmentName, WalIdentity};
use crate::recovery::tablespaces::{Created, Segment, created_by_segment, names_before};
use crate::repo::wal::wal_identity;

/// What the WAL of a view creates, as far as it was looked at.
#[derive(Debug)]
pub(super) struct Used {
    identity: WalIdentity,
    /// what begins before this is not replayed
    start: Lsn,
    looked_at: Once<Vec<Created>>,
}

impl Used {
    /// Of a backup's view; nothing was looked at yet.
    pub(super) fn of(of: &Description) -> Result<Self> {
        let start = of.start_lsn.parse();
        let start = start.context(|| format!("WAL position {} of backup {}", of.start_lsn, of.label))?;
        Ok(Self { identity: wal_identity(&of.database)?, start, looked_at: Once::default() })
    }
}

impl View {
    /// Whether opening this file means to read it.
    pub fn looks_into(&self, node: NodeIndex) -> bool {
        self.used.is_some() && matches!(self.segment(node), Ok(Some(_)))
    }

    /// Refuses WAL that creates a tablespace where another server has its files; see the module. Other files are not looked at.
    pub fn refuse_used(&self, node: NodeIndex) -> Result<()> {
        let Some(used) = &self.used else { return Ok(()) };
        let Some((pg_wal, name)) = self.segment(node)? else { return Ok(()) };
        let created = self.created(used, pg_wal, node, name)?;
        match created.iter().find(|created| created.is_used(used.identity.major)) {
            None => Ok(()),
            Some(Created { oid, path }) => Err(Error::new(format!(
                "WAL {name} creates tablespace {oid} in {}, where another server has its files: a server on this mount, \
                 or on a copy of it, would write to them. \"pgcairn start\" and \"pgcairn mount --recovered\" can go past \
                 it; a mount or a copy can on another machine, or up to a moment before this segment",
                path.display()
            ))),
        }
    }

    /// `pg_wal` and a segment's name, if the node is one there.
    fn segment(&self, node: NodeIndex) -> Result<Option<(NodeIndex, SegmentName)>> {
        let name = std::str::from_utf8(&self.node(node)?.name).ok().and_then(|name| name.parse().ok());
        let pg_wal = self.child(0, b"pg_wal");
        Ok(pg_wal.zip(name).filter(|(pg_wal, _)| self.children(*pg_wal).contains(&node)))
    }

    fn created(&self, used: &Used, pg_wal: NodeIndex, node: NodeIndex, name: SegmentName) -> Result<Arc<Vec<Created>>> {
        used.looked_at.get(node, &format!("WAL {name}"), || {
            let find = |name: &SegmentName| Some((*name, self.child(pg_wal, name.to_string().as_bytes())?));
            let before = names_before(name, &used.identity).find_map(|name| find(&name));
            let read_before = |offset: u64, buf: &mut [u8]| match before {
                Some((_, before)) => self.read_at(before, offset, buf),
                None => Ok(0),
            };
            let before = before.map(|(name, _)| Segment { name, read_at: &read_before });
            let read_at = |offset: u64, buf: &mut [u8]| self.read_at(node, offset, buf);
            let segment = Segment { name, read_at: &read_at };
            created_by_segment(&segment, before.as_ref(), used.start, &used.identity)
        })
    }
}
