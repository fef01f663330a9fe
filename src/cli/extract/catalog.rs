//! What a pattern means in the catalog of a clone: the relations it matches, and everything that inherits from them. Asked here
//! instead of left to pg_dump, which before 16 brings a partitioned table without its partitions.

use postgres::Client;

use crate::error::{Context, Error, Result};

/// A relation to bring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Relation {
    pub(super) schema: String,
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) unlogged: bool,
    /// the extension it is a part of
    pub(super) extension: Option<String>,
}

/// Kinds of relations that pg_dump knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Table,
    Partitioned,
    Foreign,
    View,
    MaterializedView,
    Sequence,
}

/// As pg_dump selects them, and their children at every level, in whatever schema.
const FIND: &str = "
WITH RECURSIVE tree AS (
    SELECT c.oid
    FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'S', 'v', 'm', 'f', 'p') AND c.relpersistence <> 't'
        AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
        AND c.relname::pg_catalog.text OPERATOR(pg_catalog.~) $1 COLLATE pg_catalog.default
        AND n.nspname::pg_catalog.text OPERATOR(pg_catalog.~) $2 COLLATE pg_catalog.default
    UNION
    SELECT i.inhrelid FROM pg_catalog.pg_inherits AS i JOIN tree ON tree.oid = i.inhparent
)
SELECT n.nspname::pg_catalog.text, c.relname::pg_catalog.text, c.relkind::pg_catalog.text,
    c.relpersistence = 'u',
    (SELECT e.extname::pg_catalog.text FROM pg_catalog.pg_depend AS d
        JOIN pg_catalog.pg_extension AS e ON e.oid = d.refobjid
        WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = c.oid AND d.objsubid = 0
            AND d.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass AND d.deptype = 'e' LIMIT 1)
FROM tree JOIN pg_catalog.pg_class AS c USING (oid) JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'S', 'v', 'm', 'f', 'p') AND c.relpersistence <> 't'
ORDER BY 1, 2";

/// What a dump would wait for: the locks of transactions that were prepared and not ended. They have no process; the lock on
/// their own number tells whose they are.
const LOCKED: &str = "
SELECT n.nspname::pg_catalog.text, c.relname::pg_catalog.text, p.gid
FROM pg_catalog.pg_prepared_xacts AS p
    JOIN pg_catalog.pg_locks AS own ON own.locktype = 'transactionid' AND own.transactionid = p.transaction AND own.pid IS NULL
    JOIN pg_catalog.pg_locks AS l ON l.virtualtransaction = own.virtualtransaction AND l.pid IS NULL
    JOIN pg_catalog.pg_class AS c ON c.oid = l.relation
    JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock'
    AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
ORDER BY 3, 1, 2";

/// Why these relations cannot be dumped: a prepared transaction has one of them for itself.
pub(super) fn locked(client: &mut Client, relations: &[Relation]) -> Result<Option<Error>> {
    let rows = client.query(LOCKED, &[]).context(|| "cannot look for locks".into())?;
    let locks = rows.iter().map(|row| (row.get::<_, String>(0), row.get::<_, String>(1), row.get::<_, String>(2)));
    let mut ours =
        locks.filter(|(schema, name, _)| relations.iter().any(|of| (&of.schema, &of.name) == (schema, name)));
    Ok(ours.next().map(|(schema, name, gid)| {
        let quoted = gid.replace('\'', "''");
        Error::new(format!("{schema}.{name} is locked by the prepared transaction '{quoted}' at that point")).hint(format!(
            "choose another point; or end it in a clone: \"pgcairn start\", there COMMIT PREPARED '{quoted}' or ROLLBACK \
             PREPARED '{quoted}', then pg_dump"
        ))
    }))
}

/// The relations that `pattern` (`schema.name`, as psql's `\d` takes it) matches, and their children.
pub(super) fn find(client: &mut Client, pattern: &str) -> Result<Vec<Relation>> {
    let (schema, name) = match &regexes(pattern)[..] {
        [schema, name] => (schema.clone(), name.clone()),
        _ => {
            return Err(Error::new(format!("{pattern} is not a schema and a table"))
                .hint("quote names with dots: shop.public.\"my.orders\""));
        }
    };
    let rows = client.query(FIND, &[&name, &schema]).context(|| format!("cannot look for {pattern}"))?;
    let relation = |row: &postgres::Row| -> Result<Relation> {
        let kind: String = row.get(2);
        let kind = match &kind[..] {
            "r" => Kind::Table,
            "p" => Kind::Partitioned,
            "f" => Kind::Foreign,
            "v" => Kind::View,
            "m" => Kind::MaterializedView,
            _ => Kind::Sequence,
        };
        Ok(Relation { schema: row.get(0), name: row.get(1), kind, unlogged: row.get(3), extension: row.get(4) })
    };
    rows.iter().map(relation).collect()
}

/// The regular expressions of the parts of a pattern, by psql's rules: letters outside quotes are folded, `*` and `?` stand for
/// any text and any character, what is between quotes stands for itself.
fn regexes(pattern: &str) -> Vec<String> {
    let (mut parts, mut part, mut quoted) = (Vec::new(), String::new(), false);
    let mut characters = pattern.chars().peekable();
    while let Some(c) = characters.next() {
        match c {
            '"' if quoted && characters.peek() == Some(&'"') => {
                characters.next();
                part.push('"');
            }
            '"' => quoted = !quoted,
            c if quoted => {
                if r"\|*+?()[]{}.^$".contains(c) {
                    part.push('\\');
                }
                part.push(c);
            }
            '.' => parts.push(std::mem::take(&mut part)),
            '*' => part.push_str(".*"),
            '?' => part.push('.'),
            '$' => part.push_str("\\$"),
            c => part.extend(c.to_lowercase()),
        }
    }
    parts.push(part);
    parts.into_iter().map(|part| format!("^({part})$")).collect()
}

impl Relation {
    /// A pattern of pg_dump that matches this relation alone.
    pub(super) fn pattern(&self) -> String {
        let quoted = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
        format!("{}.{}", quoted(&self.schema), quoted(&self.name))
    }

    /// What a person must know who expects its rows; none where they come.
    pub(super) fn lacks(&self, loads: bool) -> Option<String> {
        let name = format!("{}.{}", self.schema, self.name);
        Some(match self.kind {
            Kind::Foreign => format!(
                "{name} is a foreign table: its rows are on its server and in no backup, only its definition comes"
            ),
            Kind::MaterializedView if loads => {
                format!("{name} is a materialized view: its rows are computed anew, from the tables that are there now")
            }
            Kind::MaterializedView | Kind::View => {
                format!("{name} is a view: its definition comes, it has no rows of its own")
            }
            _ if self.unlogged => format!("{name} is unlogged: no backup has its rows"),
            _ => return None,
        })
    }

    /// Whether it may hold rows of its own.
    pub(super) fn is_table(&self) -> bool {
        matches!(self.kind, Kind::Table | Kind::Partitioned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_read_as_psql_reads_them() {
        for (pattern, expected) in [
            ("public.orders", &["^(public)$", "^(orders)$"][..]),
            ("Public.Ord*", &["^(public)$", "^(ord.*)$"]),
            ("public.\"My.Or\"\"d?\"", &["^(public)$", "^(My\\.Or\"d\\?)$"]),
            ("p?.a$b", &["^(p.)$", "^(a\\$b)$"]),
            ("orders", &["^(orders)$"]),
            ("a.b.c", &["^(a)$", "^(b)$", "^(c)$"]),
        ] {
            assert_eq!(regexes(pattern), expected, "{pattern}");
        }
        let odd =
            Relation { schema: "S".into(), name: "a\"b".into(), kind: Kind::Table, unlogged: false, extension: None };
        assert_eq!(odd.pattern(), "\"S\".\"a\"\"b\"");
    }
}
