//! Realistic contents for a database: pgbench's tables, real text, bytes that do not compress, values kept out of line.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::client::Client;
use crate::install;

/// The size of a row of random bytes.
const RANDOM_ROW_BYTES: usize = 1000;

/// What is to be in a database; the default is small enough for any test: some 30 MB.
#[derive(Clone, Copy, Debug)]
pub struct Data {
    pgbench_scale: u32,
    text_mb: u32,
    random_mb: u32,
    past_one_segment: bool,
}

impl Default for Data {
    fn default() -> Self {
        Self { pgbench_scale: 1, text_mb: 4, random_mb: 4, past_one_segment: false }
    }
}

impl Data {
    /// Nothing but small tables: some 2 MB.
    pub fn tiny() -> Self {
        Self { pgbench_scale: 0, text_mb: 0, random_mb: 0, past_one_segment: false }
    }

    /// pgbench's scale: 100,000 accounts each, some 15 MB; 0 for none.
    pub fn pgbench_scale(mut self, scale: u32) -> Self {
        self.pgbench_scale = scale;
        self
    }

    /// Lines of text, from Debian's lists of packages.
    pub fn text_mb(mut self, mb: u32) -> Self {
        self.text_mb = mb;
        self
    }

    /// Bytes that do not compress.
    pub fn random_mb(mut self, mb: u32) -> Self {
        self.random_mb = mb;
        self
    }

    /// Adds a table of more than 1 GiB, so with a second file.
    pub fn past_one_segment(mut self) -> Self {
        self.past_one_segment = true;
        self
    }

    /// Loads it all. The tables: `pgbench_*`, `text_lines`, `random_bytes`, `large_values` (kept out of line),
    /// `unlogged_rows`, and `past_one_segment` when asked; each with an index.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn load(self, client: &Client) {
        if self.pgbench_scale > 0 {
            client.pgbench(&["-i", "-q", "-s", &self.pgbench_scale.to_string()]);
        }
        self.load_text(client);
        self.load_random(client);
        load_large_values(client);
        client.psql(
            "CREATE UNLOGGED TABLE unlogged_rows (id int PRIMARY KEY, note text);
             INSERT INTO unlogged_rows SELECT i, 'row ' || i FROM generate_series(1, 1000) AS i;",
        );
        if self.past_one_segment {
            load_past_one_segment(client);
        }
    }

    fn load_text(self, client: &Client) {
        let table = "CREATE TABLE text_lines (id bigint, line text);";
        let limit = (self.text_mb as usize) << 20;
        copy(client, table, "text_lines", |to| {
            let mut written = 0;
            let mut lines = TextLines::default();
            for id in 1u64.. {
                if written >= limit.max(1) {
                    break;
                }
                let line = lines.next_line();
                written += line.len();
                writeln!(to, "{id}\t{}", line.replace('\\', "\\\\").replace(['\t', '\r', '\0'], " "))?;
            }
            Ok(())
        });
        client.psql(
            "CREATE UNIQUE INDEX ON text_lines (id);
             CREATE INDEX ON text_lines (left(line, 40)); ANALYZE text_lines;",
        );
    }

    fn load_random(self, client: &Client) {
        let rows = (((self.random_mb as usize) << 20) / RANDOM_ROW_BYTES).max(1);
        copy(client, "CREATE TABLE random_bytes (id bigint, payload bytea);", "random_bytes", |to| {
            let mut random = Random(0x9E37_79B9_7F4A_7C15);
            for id in 1..=rows {
                write!(to, "{id}\t\\\\x")?;
                for _ in 0..RANDOM_ROW_BYTES / 8 {
                    write!(to, "{:016x}", random.next())?;
                }
                writeln!(to)?;
            }
            Ok(())
        });
        client.psql(
            "CREATE UNIQUE INDEX ON random_bytes (id);
             CREATE INDEX ON random_bytes (substr(payload, 1, 16)); ANALYZE random_bytes;",
        );
    }
}

/// Values of some 100 KB: compressed, or stored as they are, but out of line either way.
fn load_large_values(client: &Client) {
    client.psql(
        "CREATE TABLE large_values (id int PRIMARY KEY, compressed text, external text);
         ALTER TABLE large_values ALTER external SET STORAGE EXTERNAL;
         INSERT INTO large_values SELECT i, v, v FROM generate_series(1, 5) AS i,
             LATERAL (SELECT string_agg(md5((i * j)::text), '') AS v FROM generate_series(1, 3000) AS j) AS made;",
    );
}

/// One row a page, as wide as a page lets it be.
fn load_past_one_segment(client: &Client) {
    client.psql(
        "CREATE TABLE past_one_segment (id int, filler text);
         ALTER TABLE past_one_segment ALTER filler SET STORAGE PLAIN;
         INSERT INTO past_one_segment SELECT i, repeat(md5(i::text), 250) FROM generate_series(1, 133000) AS i;
         CREATE INDEX ON past_one_segment (id);",
    );
}

/// Makes a table and streams rows into it.
fn copy(client: &Client, create: &str, table: &str, rows: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) {
    client.psql(create);
    let mut psql = install::client("psql");
    psql.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", client.conninfo(), "-c"])
        .arg(format!("COPY {table} FROM STDIN"));
    let mut psql = psql.stdin(Stdio::piped()).spawn().expect("psql can be started");
    let mut to = std::io::BufWriter::new(psql.stdin.take().expect("piped"));
    let written = rows(&mut to).and_then(|()| to.flush());
    drop(to);
    let status = psql.wait().expect("a child can be waited for");
    assert!(status.success() && written.is_ok(), "cannot fill {table}: {status}, {written:?}");
}

/// The lines of Debian's lists of packages, again and again.
#[derive(Default)]
struct TextLines {
    text: String,
    at: usize,
    rounds: u32,
}

impl TextLines {
    fn next_line(&mut self) -> String {
        if self.at >= self.text.len() {
            if self.text.is_empty() {
                self.text = debian_text();
            }
            self.at = 0;
            self.rounds += 1;
        }
        let rest = &self.text[self.at..];
        let line = rest.split_once('\n').map_or(rest, |(line, _)| line);
        self.at += line.len() + 1;
        // later rounds must not repeat the first: a chunk is stored once however often it is there
        if self.rounds > 1 { format!("{line} [{}]", self.rounds) } else { line.to_owned() }
    }
}

fn debian_text() -> String {
    let lists = fs::read_dir("/var/lib/apt/lists").into_iter().flatten().flatten().map(|entry| entry.path());
    let mut lists: Vec<PathBuf> = lists.filter(|path| path.to_string_lossy().contains("_Packages")).collect();
    lists.sort();
    // apt keeps its lists as they are or compressed, and knows how to read them
    let shown = Command::new("/usr/lib/apt/apt-helper").arg("cat-file").args(lists).stderr(Stdio::null()).output();
    let mut text = shown.map(|output| output.stdout).unwrap_or_default();
    if text.is_empty() {
        // dpkg's own list of what is installed is always there
        text = fs::read("/var/lib/dpkg/status").unwrap_or_default();
    }
    if text.is_empty() {
        text = b"no list of packages on this machine\n".to_vec();
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// xorshift64*: the same bytes in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
}
