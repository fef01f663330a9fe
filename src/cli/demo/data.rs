//! What the throwaway cluster holds: accounts that change, text that compresses, images that do not.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::cluster::connect;
use super::shell::{As, Shell};
use crate::error::{Context, Error, Result};

/// What 100,000 of pgbench's accounts take, in MB.
const MB_PER_SCALE: u32 = 15;
/// Bytes of one image.
const IMAGE_BYTES: usize = 20_000;

const PACKAGES: &str = "CREATE TABLE packages (id bigint, name text, version text, section text, about text)";
const PACKAGES_INDEXES: &str =
    "ALTER TABLE packages ADD PRIMARY KEY (id); CREATE INDEX ON packages (name); ANALYZE packages";
const IMAGES: &str =
    "CREATE TABLE images (id bigint, image bytea); ALTER TABLE images ALTER image SET STORAGE EXTERNAL";
const IMAGES_INDEXES: &str = "ALTER TABLE images ADD PRIMARY KEY (id); ANALYZE images";

/// Fills the database: half of it pgbench's tables, a third text, the rest random bytes; each with indexes.
pub(super) fn load(shell: &Shell, conninfo: &str, size_mb: u32, say: impl Fn(&str)) -> Result<()> {
    let scale = (size_mb / 2 / MB_PER_SCALE).max(1);
    say(&format!("pgbench_*   {scale}00,000 accounts"));
    shell.quietly(As::Caller, Path::new("pgbench"), &["-i", "-q", "-s", &scale.to_string(), conninfo])?;
    let (text_mb, images_mb) = (size_mb * 3 / 10, size_mb / 5);
    say(&format!("packages    {text_mb} MB of text: Debian's descriptions of its packages"));
    let text = text_bytes(text_mb);
    copy(conninfo, PACKAGES, "packages", PACKAGES_INDEXES, |to| packages(shell, to, text))?;
    say(&format!("images      {images_mb} MB of random bytes, as photographs are to a compressor"));
    copy(conninfo, IMAGES, "images", IMAGES_INDEXES, |to| images(shell, to, text_bytes(images_mb)))
}

fn text_bytes(mb: u32) -> usize {
    (mb as usize) << 20
}

/// Makes a table and streams rows into it, in one transaction.
fn copy(
    conninfo: &str,
    create: &str,
    table: &str,
    indexes: &str,
    rows: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let failed = || format!("cannot fill the table {table}");
    let mut client = connect(conninfo)?;
    let mut transaction = client.transaction().context(failed)?;
    transaction.batch_execute(create).context(failed)?;
    let mut to = io::BufWriter::with_capacity(
        1 << 16,
        transaction.copy_in(&format!("COPY {table} FROM STDIN")).context(failed)?,
    );
    let written = rows(&mut to).and_then(|()| to.flush());
    if written.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::Interrupted) {
        return Err(Error::new("interrupted"));
    }
    written.context(failed)?;
    to.into_inner().map_err(|error| Error::new(failed()).source(error.into_error()))?.finish().context(failed)?;
    transaction.batch_execute(indexes).context(failed)?;
    transaction.commit().context(failed)
}

/// Rows of text from this machine's lists of packages, again and again, up to a size.
fn packages(shell: &Shell, to: &mut dyn Write, bytes: usize) -> io::Result<()> {
    let text = package_lists(bytes);
    let paragraphs: Vec<&str> = text.split("\n\n").map(str::trim).filter(|paragraph| !paragraph.is_empty()).collect();
    let mut written = 0;
    for (id, paragraph) in (1u64..).zip(paragraphs.iter().cycle()) {
        if written >= bytes {
            break;
        }
        stop_if_asked(shell, id)?;
        let field = |name: &str| {
            paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).unwrap_or_default()
        };
        let values = [field("Package"), field("Version"), field("Section"), paragraph].map(escaped);
        let row = format!("{id}\t{}\n", values.join("\t"));
        to.write_all(row.as_bytes())?;
        written += row.len();
    }
    Ok(())
}

/// As COPY wants it.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('\t', "\\t").replace('\n', "\\n").replace('\r', "\\r").replace('\0', "")
}

/// Text of up to about this size: what apt knows, or what dpkg has installed.
fn package_lists(bytes: usize) -> String {
    let lists = fs::read_dir("/var/lib/apt/lists").into_iter().flatten().flatten().map(|entry| entry.path());
    let mut lists: Vec<PathBuf> = lists.filter(|path| path.to_string_lossy().contains("_Packages")).collect();
    lists.sort();
    // apt keeps its lists as they are or compressed, and knows how to read them
    let shown = Command::new("/usr/lib/apt/apt-helper").arg("cat-file").args(lists).stderr(Stdio::null()).output();
    let mut text = shown.map(|output| output.stdout).unwrap_or_default();
    for other in ["/var/lib/dpkg/status", "/usr/share/common-licenses/GPL-3", "/etc/services"] {
        if text.is_empty() {
            text = fs::read(other).unwrap_or_default();
        }
    }
    text.truncate(bytes);
    if text.is_empty() {
        text = b"Package: none\nDescription: this machine has no list of packages".to_vec();
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// Rows of random bytes, up to a size.
fn images(shell: &Shell, to: &mut dyn Write, bytes: usize) -> io::Result<()> {
    let mut image = vec![0; IMAGE_BYTES];
    let mut hex = String::with_capacity(2 * IMAGE_BYTES);
    for id in 1..=(bytes / IMAGE_BYTES) as u64 {
        stop_if_asked(shell, id)?;
        getrandom::fill(&mut image).map_err(io::Error::other)?;
        hex.clear();
        for byte in &image {
            for digit in [byte >> 4, byte & 15] {
                hex.push(char::from(b"0123456789abcdef"[usize::from(digit)]));
            }
        }
        writeln!(to, "{id}\t\\\\x{hex}")?;
    }
    Ok(())
}

fn stop_if_asked(shell: &Shell, row: u64) -> io::Result<()> {
    match row.is_multiple_of(64) && shell.interrupted() {
        true => Err(io::ErrorKind::Interrupted.into()),
        false => Ok(()),
    }
}
