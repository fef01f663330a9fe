mod amend;
mod limits;
mod login;
mod reach;
mod replay;
mod settings;
mod walls;

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;

use self::amend::Amended;
use self::limits::Limits;
use self::login::check_path;
pub(super) use self::login::{LoginOptions, said};
use self::reach::{Arrival, Attempt, LOCK_FILE, Reached};
use self::replay::Replay;
use self::walls::settle_links;
use super::clones::{Clone, Login, Place};
use super::mount::{self, Mount};
use super::options::{Cache, Common, Output};
use super::point::{self, PointOptions};
use super::{output, pg, signals};
use crate::error::{Error, Result};
use crate::format::manifest::Description;
use crate::interrupt;
use crate::postgres::{AUTO_CONF, RECOVERY_SIGNAL};
use crate::read::completion::Prepared;
use crate::read::tree::Owner;
use crate::recovery::plan::Bound;
use crate::recovery::target::{Action, Target};
use crate::repo::Repository;
use crate::user::{User, as_user};

/// A `restore_command` where `pg_wal` has everything.
const NOTHING_TO_RESTORE: &str = "false";

/// Start PostgreSQL on a backup, in seconds, whatever its size
///
/// Mounts the backup with a scratch layer and starts a server on it that archives nothing, follows nobody and listens on a
/// socket of its own. Only pages that are touched are fetched; what is written goes to the scratch and never to the backup.
#[derive(Debug, Args)]
pub(super) struct Start {
    /// Which point: a label, latest, a time, an LSN, or the name of a restore point [default: latest]
    #[arg(value_name = "POINT")]
    backup: Option<String>,
    #[command(flatten)]
    point: PointOptions,
    /// Stop at the target, open for reading only
    #[arg(long)]
    read_only: bool,
    /// Name of the clone, by which it is stopped and continued [default: stanza and label]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Port, which names the socket [default: a free one]
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// Directory of PostgreSQL's programs of the backup's major version [default: looked for]
    #[arg(long, env = "PGCAIRN_PG_BIN", value_name = "DIR")]
    pg_bin: Option<PathBuf>,
    /// User the server runs as; only for root [default: the owner of the backed up cluster]
    #[arg(long, env = "PGCAIRN_OWNER", value_name = "USER")]
    owner: Option<String>,
    /// A setting of the clone's server, e.g. shared_buffers=1GB. May be repeated
    #[arg(long = "option", value_name = "NAME=VALUE")]
    options: Vec<String>,
    /// Let the server reach the network and the sockets of this machine, e.g. for foreign servers and dblink
    #[arg(long)]
    network: bool,
    /// Directory in which clones live
    #[arg(long, env = "PGCAIRN_CLONE_PATH", value_name = "DIR")]
    clone_path: Option<PathBuf>,
    /// Seconds to wait for the server
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    start_timeout: u64,
    #[command(flatten)]
    login: LoginOptions,
    /// Output for people or programs
    #[arg(long, default_value = "text")]
    output: Output,
    #[command(flatten)]
    cache: Cache,
    /// Whether somebody is to log in before it counts as started
    #[arg(skip = true)]
    needs_login: bool,
    /// Whether somebody looks at it, who is told where the end of the archive stands for a moment
    #[arg(skip = true)]
    for_people: bool,
}

/// A clone that answers.
pub(super) struct Running {
    /// what is known of it
    pub(super) clone: Clone,
    /// where it lives
    pub(super) place: Place,
    /// where its recovery ended, and how to log in
    reached: Reached,
    /// its major version
    pub(super) major: u32,
}

impl Running {
    /// Where its recovery ended, in words; none where nothing was recovered.
    pub(super) fn moment(&self) -> Option<String> {
        self.reached.moment()
    }

    /// How to log in.
    pub(super) fn login(&self) -> Result<&Login> {
        self.reached.login.as_ref().ok_or_else(|| Error::new("nobody logged in to the clone"))
    }
}

impl Start {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let started = Instant::now();
        let running = self.launch(common)?;
        let took = started.elapsed();
        let conninfo = running.clone.conninfo(&running.place, running.login()?);
        if running.clone.recovery.is_none() {
            leave_backup_segment(&running.clone.own_conninfo(&running.place, running.login()?));
        }
        report(&self, &running, &conninfo, took);
        Ok(())
    }

    /// A clone that another verb needs for a while; its name ends with this process's id.
    pub(super) fn for_verb(
        verb: &str,
        backup: Option<&str>,
        point: &PointOptions,
        (pg_bin, owner): (Option<&Path>, Option<&str>),
        (options, clone_path, start_timeout): (&[String], Option<&Path>, u64),
        login: Option<&LoginOptions>,
        cache: &Cache,
    ) -> Self {
        Self {
            backup: backup.map(str::to_owned),
            point: point.clone(),
            read_only: false,
            name: Some(format!("{verb}-{}", std::process::id())),
            port: None,
            pg_bin: pg_bin.map(Path::to_owned),
            owner: owner.map(str::to_owned),
            options: options.to_vec(),
            network: false,
            clone_path: clone_path.map(Path::to_owned),
            start_timeout,
            needs_login: login.is_some(),
            for_people: false,
            login: login.cloned().unwrap_or_default(),
            output: Output::Text,
            cache: cache.clone(),
        }
    }

    /// Brings the clone up, or leaves nothing of it.
    pub(super) fn launch(&self, common: &Common) -> Result<Running> {
        let repository = common.repository()?;
        let known =
            self.name.as_deref().map(|name| Place::new(self.clone_path.as_deref(), name)?.load()).transpose()?;
        let mut turn = None;
        let (label, recovery, continued) = match known.flatten() {
            Some(clone) => {
                turn = Some(self.continued(&clone, &repository.stanza)?);
                (clone.label.clone(), clone.recovery.clone(), Some(clone))
            }
            None => {
                let (label, recovery) = self.course(&repository)?;
                (label, recovery, None)
            }
        };
        let description = repository.description(&label)?;
        let programs = pg::programs(description.database.version, self.pg_bin.as_deref())?;
        let owner = mount::owner(self.owner.as_deref(), &description.owner)?;
        refuse_root(owner)?;
        let tablespaces = continued.as_ref().map(|clone| clone.tablespaces.clone()).unwrap_or_default();
        let port = self.port.map_or_else(free_port, Ok)?;
        signals::be_patient()?;
        let (name, place) = self.placed(&format!("{}-{label}", repository.stanza), continued.is_some())?;
        let mut clone = Clone {
            name,
            stanza: repository.stanza.clone(),
            label: label.clone(),
            recovery,
            read_only: continued.as_ref().map_or(self.waits(), |clone| clone.read_only),
            tablespaces,
            port,
            programs,
            uid: owner.uid,
            gid: owner.gid,
        };
        place.create(owner)?;
        let _turn = turn.map_or_else(|| place.take(), Ok)?;
        place.save(&clone)?;
        let result = self.bring_up(common, &place, &mut clone, &description, owner);
        // one that came in the last moment counts, too
        let result = result.and_then(|reached| interrupt::check().map(|()| reached));
        match result {
            Ok(reached) => Ok(Running { clone, place, reached, major: description.database.version }),
            Err(error) => {
                // whatever is up comes down again; a continued clone keeps what it had written
                if continued.is_none() {
                    _ = super::stop::end_server(&place);
                }
                if let Err(left) = super::stop::bring_down(&place, &clone, continued.is_some()) {
                    output::note(&format!(
                        "the clone could not be taken down ({left}); \"pgcairn stop {}\" tries again",
                        clone.name
                    ));
                }
                Err(error)
            }
        }
    }

    /// The clone's name and its directory, which is made now unless the clone is continued: nobody else has it then. Without
    /// --name it is called `usual`, with a number behind that where one is there, so that one backup can be started several times.
    fn placed(&self, usual: &str, continued: bool) -> Result<(String, Place)> {
        let mut number = 1;
        loop {
            let name = match (&self.name, number) {
                (Some(name), _) => name.clone(),
                (None, 1) => usual.to_owned(),
                (None, number) => format!("{usual}-{number}"),
            };
            let place = Place::new(self.clone_path.as_deref(), &name)?;
            check_path(&place)?;
            if continued || place.claim()? {
                return Ok((name, place));
            }
            if self.name.is_some() {
                return Err(Error::new(format!("a clone {name} exists already in {}", place.root().display()))
                    .hint(format!("give another --name, or \"pgcairn stop {name}\"")));
            }
            number += 1;
        }
    }

    /// True when the server is to wait at its target.
    fn waits(&self) -> bool {
        self.read_only || self.point.waits()
    }

    /// The backup to stand on, and the recovery from there.
    fn course(&self, repository: &Repository) -> Result<(String, Option<Prepared>)> {
        let mut point = self.point.point(self.backup.as_deref())?;
        match (&point.target, point.action) {
            (_, Some(Action::Shutdown)) => {
                return Err(
                    Error::new("a clone that shuts down at its target is none").hint("leave --target-action out")
                );
            }
            (_, Some(Action::Promote)) if self.read_only => {
                return Err(Error::new("--read-only waits at the target, --target-action promote goes on from it")
                    .hint("give one of them"));
            }
            (Target::Standby | Target::Preserve, _) => {
                return Err(
                    Error::new("a clone follows nobody").hint("\"pgcairn restore --type standby\" makes a standby")
                );
            }
            (Target::None, _) if self.waits() => point.target = Target::Immediate,
            _ => {}
        }
        // one that waits at its target is at it
        let bound = if self.for_people && !self.waits() { Bound::ArchiveEnd } else { Bound::Archive };
        let course = point::find(repository, &point, bound, &self.cache)?;
        let action = if self.waits() { Action::Pause } else { Action::Promote };
        // all the WAL it needs is in its mount: nothing else is asked, so that it ends there or says why not
        let prepared = point::presented(&course, action, NOTHING_TO_RESTORE);
        Ok((course.label, prepared))
    }

    /// Whether a clone can be started again by name. What is left of it where its server or its mount died is cleared
    /// away; what was written stays. Returns the clone's lock.
    fn continued(&self, clone: &Clone, stanza: &str) -> Result<fs::File> {
        let place = Place::new(self.clone_path.as_deref(), &clone.name)?;
        let named = self.backup.as_deref().is_some_and(|backup| backup != "latest" && backup != clone.label);
        let other = named || !self.point.is_empty() || (self.read_only && !clone.read_only);
        if other || clone.stanza != stanza {
            return Err(Error::new(format!(
                "clone {} stands on backup {} of {}",
                clone.name, clone.label, clone.stanza
            ))
            .hint("give another --name"));
        }
        let turn = place.take()?;
        if super::stop::is_running(&place)? {
            return Err(Error::new(format!("clone {} runs already", clone.name)).hint(format!(
                "\"pgcairn stop {name} --keep\" ends it and keeps what was written; another --name starts another",
                name = clone.name
            )));
        }
        super::stop::take_down(&place, Some(clone))?;
        Ok(turn)
    }

    fn bring_up(
        &self,
        common: &Common,
        place: &Place,
        clone: &mut Clone,
        of: &Description,
        owner: Owner,
    ) -> Result<Reached> {
        let mount = Mount::for_clone(
            (&clone.label, clone.recovery.as_ref()),
            &place.scratch(),
            self.owner.as_deref(),
            &place.mount(),
            &self.cache,
        )?;
        super::stop::end_server(place)?;
        place.forget_sockets()?;
        mount::spawn(&mount, common, &place.mount_log())?;
        write_files(place, owner)?;
        let logins = self.needs_login.then(|| self.login.candidates(of));
        let limit = (Instant::now(), Duration::from_secs(self.start_timeout));
        let (mut limits, mut replay) = (Limits::of(place)?, Replay::new(clone, of));
        let mut amended = Amended::default();
        loop {
            forget_old_server(place, owner)?;
            settle_links(place, clone, of)?;
            let attempt = Attempt::new((place, clone), logins.as_ref(), limits, limit);
            let arrived = self.start_server(&attempt, of, &amended, &mut replay);
            if let Ok(Arrival::Reached(reached)) = arrived {
                settle_links(place, clone, of)?;
                return Ok(Reached { left_out: amended.into_words(), ..reached });
            }
            let log = attempt.log();
            // what was replayed is in the scratch, and replay goes on from there
            super::stop::end_server(place)?;
            interrupt::check()?;
            match arrived {
                Ok(Arrival::Raised(raised)) => limits = raised,
                Err(_) if amended.by_log((place, &*clone, of), &log, &self.options)? => {}
                // replay asks for directories that only the WAL names: it goes on when they are there
                Err(error) if !self.cover_new_tablespaces(place, clone, of)? => return Err(error),
                _ => {}
            }
        }
    }

    /// Starts the server and waits until it is at its target.
    fn start_server(
        &self,
        attempt: &Attempt<'_>,
        of: &Description,
        amended: &Amended,
        replay: &mut Option<Replay>,
    ) -> Result<Arrival> {
        let (place, clone) = (attempt.place, attempt.clone);
        let recovers = of.database.version >= 14 && place.mount().join(RECOVERY_SIGNAL).exists();
        if recovers {
            set_restore_command(place, Owner { uid: clone.uid, gid: clone.gid }, NOTHING_TO_RESTORE)?;
        }
        let mut command = clone.pg_ctl(place);
        command.arg("start").arg("-s").arg("-w").arg("-t").arg(self.start_timeout.to_string());
        let options = self.server_options((place, clone, of), &attempt.limits, amended)?;
        command.arg("-l").arg(place.log()).arg("-o").arg(options);
        if !self.run_server(attempt, of, &mut command, replay)?.status.success() {
            return attempt.ended("did not start");
        }
        if recovers {
            // the server demands the command when it starts, and would run it for every segment, although all of them lie in
            // pg_wal: each run of a program makes the kernel write out every file the server has open
            set_restore_command(place, Owner { uid: clone.uid, gid: clone.gid }, "")?;
            super::stop::reload(place)?;
        }
        attempt.reach_target(replay)
    }
}

/// The last setting of a name counts.
fn set_restore_command(place: &Place, owner: Owner, command: &str) -> Result<()> {
    let path = place.mount().join(AUTO_CONF);
    as_user(User::other(owner.uid, owner.gid).as_ref(), || {
        let file = fs::OpenOptions::new().append(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let mut file = file.map_err(|error| Error::io("open", &path, error))?;
        writeln!(file, "restore_command = '{command}'").map_err(|error| Error::io("write", &path, error))
    })
}

/// Removes the lock file of a server that ended together with its mount. Nobody can be running on a mount this new, but
/// PostgreSQL would believe the file while that process id is taken: by another process, or by one its parent forgets.
fn forget_old_server(place: &Place, owner: Owner) -> Result<()> {
    let lock = place.mount().join(LOCK_FILE);
    as_user(User::other(owner.uid, owner.gid).as_ref(), || match fs::remove_file(&lock) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", &lock, error)),
        _ => Ok(()),
    })
}

fn refuse_root(owner: Owner) -> Result<()> {
    match owner.uid {
        0 => Err(Error::new("PostgreSQL refuses to run as root").hint("name the user it runs as with --owner")),
        _ => Ok(()),
    }
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    Ok(listener.map_err(|error| Error::new("cannot find a free port").source(error))?.port())
}

/// Access rules of the clone's own, since only its user and root can reach the socket; and a postgresql.conf where the cluster
/// keeps it outside the data directory.
fn write_files(place: &Place, owner: Owner) -> Result<()> {
    // as that user, who owns the directories and may have put links there
    let user = User::other(owner.uid, owner.gid);
    let write = |path: &Path, text: &str| -> Result<()> {
        as_user(user.as_ref(), || fs::write(path, text).map_err(|error| Error::io("write", path, error)))
    };
    write(&place.run().join("pg_hba.conf"), "local all all trust\n")?;
    write(&place.run().join("pg_ident.conf"), "")?;
    let conf = place.mount().join("postgresql.conf");
    match conf.try_exists() {
        Ok(true) => Ok(()),
        Ok(false) => write(&conf, "# the backed up cluster keeps its configuration outside the data directory\n"),
        Err(error) => Err(Error::io("look at", &conf, error)),
    }
}

/// Leaves the WAL segment that came from the backup: one that is the scratch's own from birth is written without us.
fn leave_backup_segment(conninfo: &str) {
    let switched = postgres::Client::connect(conninfo, postgres::NoTls)
        .and_then(|mut client| client.simple_query("SELECT pg_catalog.pg_switch_wal()"));
    if let Err(error) = switched {
        tracing::info!(%error, "the clone goes on in the backup's WAL segment");
    }
}

fn report(start: &Start, running: &Running, conninfo: &str, took: Duration) {
    let Running { clone, place, reached, .. } = running;
    let (lsn, time) = (reached.lsn.map(|lsn| lsn.to_string()), reached.time.map(|time| time.to_string()));
    let wanted = clone.recovery.as_ref().and_then(|prepared| prepared.recovery.wanted.as_deref());
    if start.output == Output::Json {
        let json = serde_json::json!({
            "name": clone.name, "backup": clone.label, "conninfo": conninfo, "port": clone.port,
            "data-directory": place.mount(), "first-answer-ms": took.as_millis() as u64,
            "reached": { "lsn": lsn, "time": time, "wanted": wanted }, "left-out": reached.left_out,
        });
        return output::line(&format!("{json:#}"));
    }
    output::line(&format!(
        "clone {} of backup {}: first answer after {:.2} s",
        clone.name,
        clone.label,
        took.as_secs_f64()
    ));
    if let Some(moment) = reached.moment() {
        output::line(&format!("  {moment}"));
    }
    if let Some(wanted) = wanted {
        output::line(&format!("  it is the end of the archive, and nothing there says that {wanted} was reached"));
    }
    output::line(&format!("  psql {}", shell_word(conninfo)));
    output::line(&format!("  pgcairn stop {}", clone.name));
}

/// One word for a shell.
fn shell_word(text: &str) -> String {
    match text.contains(['"', '$', '`']) {
        true => format!("'{}'", text.replace('\'', r"'\''")),
        // a backslash stays one before anything but these
        false => format!("\"{text}\""),
    }
}
