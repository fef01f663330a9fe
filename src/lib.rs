//! pgcairn keeps a PostgreSQL cluster as content-addressed chunks, and mounts any backup of it.
//!
//! ```text
//!  PGDATA ──scan──> slots ──hash──> chunks ──zstd──> packs ──> store (S3 or a directory)
//!  archive_command ──> WAL file ────────────────────────────> store
//!                                                               │
//!  store ──ranged GET, check──> chunk cache ──> view ──┬──> mount (FUSE) ──> kernel ──> PostgreSQL, ls, cp
//!                                                      ├──> restore (a plain copy) ──> PGDATA
//!                                                      └──> archive-get ──> pg_wal
//! ```
//!
//! # The rooms, in the order in which data flows
//!
//! | room | what is in it |
//! |---|---|
//! | [`cli`] | one file per command: arguments, one call, what is printed |
//! | [`backup`] | `PGDATA` to packs: session with the server, scan or stream, chunker, parent, packer, commit |
//! | [`archive`] | WAL, both ways: `archive-push`, `archive-get`, the workers ahead of them, the spool |
//! | [`recovery`] | a recovery target to a plan: its grammar, the recovery window, times found in WAL |
//! | [`read`] | packs to verified bytes: fetch, caches, the view of a backup, the trees that a mount serves |
//! | [`restore`] | a view to a plain directory |
//! | [`clone`](mod@clone) | the server of a clone: its settings, its environment, its namespaces |
//! | [`retention`] | which backups and WAL stay; expire, mark, sweep. The only room that deletes |
//! | [`verify`] | whether what is stored is sound; repair |
//! | [`repo`] | one stanza: catalog, manifests, archive, locks, proofs of content, secrets |
//! | [`format`](mod@format) | every stored byte; `docs/format.md` says the same in prose, `docs/reader.py` proves it |
//! | [`store`] | objects in a directory, on S3, in memory; retry, deadlines, faults for tests |
//! | [`postgres`] | what is known of PostgreSQL's own files |
//! | `pgcairn_mount` | a crate of its own: FUSE over any `Tree`, with a copy-on-write scratch |
//!
//! Beside them: [`files`] (files that appear whole or not at all), [`user`] (a user's files are worked
//! on as that user), [`interrupt`] (signals end long work where it can clean up), [`error`] and
//! [`progress`].
//!
//! Imports point one way, held by `tests/architecture.rs`:
//!
//! ```text
//! cli -> {backup, archive, restore, clone, verify -> retention} -> read -> recovery -> repo -> {format, store} -> postgres
//! ```
//!
//! `recovery` lies below `read`, since a plan needs no byte of a pack, and a view is prepared for a plan.
//!
//! Where to begin: a wrong recovery target, [`recovery::target`] and [`recovery::plan`]; a slow
//! archive-get, [`archive::prefetch`]; a wrong page in a mount, [`read::view`] and the mount crate's
//! `scratch`; a retention rule, [`retention::policy`]; an S3 option, `cli/options.rs` and
//! `store/s3/connect.rs`.
//!
//! # Invariants
//!
//! 1. **`format` and `postgres` do no I/O.** Test: `tests/architecture.rs`.
//! 2. **`pgcairn_mount` knows nothing of S3, PostgreSQL or tokio.** Test: `tests/architecture.rs`.
//! 3. **An object, once written, is never rewritten**, but for `backup.info`, `archive.info`, their `.copy`, the `latest`
//!    pointers, and locks, which their holders write again and again to show that they live. Packs have random names; a WAL object's name holds the hash of its content. `tests/architecture.rs` knows the
//!    few places that put objects.
//! 4. **Commit order: packs, then the manifest, then the catalog.** A backup exists when its manifest exists; whatever died
//!    before is garbage, never damage. Held by `backup::run`, which runs after every upload has ended;
//!    `tests/golden.rs` shows that the catalog can be made again from the manifests.
//! 5. **Only [`retention`] deletes objects.** (A lock is taken away by its holder, or when that is dead; the demo removes the stanza
//!    that it made.) Test: `tests/architecture.rs`. It deletes a pack only while no backup runs, when no manifest refers to it,
//!    and a grace period after that was first seen; a manifest that cannot be read stops it. Held by `retention::sweep`; tests:
//!    [`retention::expire`]'s, with a store that fails at every call, and `src/retention/tests/schedule`, with everything at once in random order.
//! 6. **Every byte that leaves `read::fetch` was checked against its chunk's name**, or, from the disk cache, against the hashes
//!    kept beside it. Where a restore passes the caches, what is stored was checked by its seal, which is bound to the name, and
//!    what was written by the file's checksum; what a delta restore leaves where it is was compared with the hash of its grain, and
//!    counts in that checksum. A WAL segment that `archive-get` delivers or a mount shows is proved by its seals, and by the checksum of
//!    every record when it is replayed. A byte that cannot be had is EIO (mount) or an error (restore), never zeros and never old bytes.
//!    Held by [`format::chunk::Decoder`] and [`read::cache`]. Tests: theirs, and `read::fetch`'s `one_damaged_chunk_harms_only_itself`.
//! 7. **Only what the manifest does not hold is "no such file".** A store that fails, and an object that is missing though
//!    something names it, are I/O errors: PostgreSQL takes an absent relation segment for an empty one. Held by
//!    `read::fetch::missing` and by the port `pgcairn_mount::Tree`. Tests: `read::fetch`'s `a_missing_pack_is_damage_not_absence`,
//!    the store's conformance suite.
//! 8. **A clone can never push WAL into its source's archive.** Every view that is mounted, and every restored copy unless asked
//!    otherwise, has `archive_mode = off` in `postgresql.auto.conf` ([`read::view::ViewOptions::copy`]); `start` says it on the command
//!    line too; `archive-push` refuses the WAL of another cluster, and other content under a known name. Test: `tests/golden.rs`.
//!
//! 9. **In an encrypted stanza nothing is stored, and nothing is believed, that is not sealed with its secret**, but for the object
//!    that holds the secret, wrapped by a passphrase. A program without the passphrase stops before it writes. Held by
//!    `repo::Repository::open`, by [`format::info::decode`], by the seal in every pack's header, and by the proof of a manifest's list
//!    of chunks, without which stored chunks could be put together to another manifest (`repo::manifest`). Tests: theirs, and
//!    `integration/tests/encrypted.rs`, which searches every object for what must not be there. There is always a passphrase that
//!    opens, wherever a change of it dies: `repo::passwd`'s tests.
//!
//! 10. **What was fsynced through a mount is there after a power loss**, and nothing that was there before is zeros. A
//!     mount that was unmounted lets go of its scratch, whoever has an idle copy of it. Held by `pgcairn_mount`; tests:
//!     `mount/tests/power_cut.rs`, with real power cuts, and `integration/tests/durable.rs`, with PostgreSQL.
//! 11. **Root follows no link that another user could have planted, and deletes nothing that it did not make.** A user's
//!     files are read and written as that user ([`user::as_user`]): a data directory by backup, a restored copy, a clone's
//!     own directory. Below a directory repository no link is followed ([`store::DirectoryStore`]); a cache is cleaned
//!     only if it carries its mark, and of its own names. What root keeps for itself (clones, caches, spools, scratches) lies where
//!     nobody else can write or rename, up to `/` ([`user::require_own`]). A small file that a user may have put there is read
//!     only if it is a regular one ([`files::read_regular`]). Tests: theirs, and `integration/tests/elsewhere.rs`.
//!
//! 11. **"Archived" is proved by content, never by name, and a backup exists only for a server whose WAL is in this archive.** Held by
//!     `backup::rival`, `backup::preflight::prove_archiving` and [`repo::proof`]; `archive-get` delivers WAL of the cluster that asks only
//!     ([`repo::asking`]). Test: `integration/tests/proof.rs`.
//!
//! Further: there is one place where sync code waits for async code (`store::s3::bridge`), and the library prints nowhere. Both
//! are lints, and `tests/architecture.rs` holds them too.
pub mod archive;
pub mod backup;
pub mod cli;
pub mod clone;
pub mod error;
pub mod files;
pub mod format;
pub mod interrupt;
pub mod postgres;
pub mod progress;
pub mod read;
pub mod recovery;
pub mod repo;
pub mod restore;
pub mod retention;
pub mod store;
pub mod user;
pub mod verify;
