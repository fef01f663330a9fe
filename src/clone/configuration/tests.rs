#![allow(clippy::unwrap_used)]
use std::collections::BTreeMap;

use super::*;

struct Written(BTreeMap<&'static str, &'static str>);

impl Files for Written {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let text = self.0.get(path.to_str().unwrap()).ok_or(io::ErrorKind::NotFound)?;
        Ok(text.as_bytes().to_vec())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        let below = self.0.keys().map(PathBuf::from).filter(|file| file.parent() == Some(path));
        Ok(below.collect())
    }
}

fn configuration() -> Configuration {
    let files = [
        (
            "/data/postgresql.conf",
            "work_mem = 1MB\ninclude 'more.conf'\nInclude_Dir = '/etc/conf.d'\ninclude '/etc/x/../missing.conf'\n\
             lc_time = 'xx_XX' # why",
        ),
        ("/data/more.conf", "LC_Time 'yy_YY'\nfoo = 1\nWork_Mem 2MB\n"),
        ("/etc/conf.d/1.conf", "shared_preload_libraries = 'a, b'\nbad line here\n"),
        ("/etc/conf.d/2.conf", "include_if_exists 'none.conf'\n"),
    ];
    Configuration::read(Path::new("/data/postgresql.conf"), &Written(files.into())).unwrap()
}

#[test]
fn what_is_included_stands_in_its_place() {
    let of = configuration();
    assert_eq!(
        String::from_utf8(of.text()).unwrap(),
        "work_mem = 1MB\n# include 'more.conf'\nLC_Time 'yy_YY'\nfoo = 1\nWork_Mem 2MB\n# Include_Dir = '/etc/conf.d'\n\
         shared_preload_libraries = 'a, b'\nbad line here\n# include_if_exists 'none.conf'\n\
         # include '/etc/x/../missing.conf'\nlc_time = 'xx_XX' # why\n"
    );
    assert_eq!(of.value("lc_time").as_deref(), Some("xx_XX"));
    assert_eq!(of.value("shared_preload_libraries").as_deref(), Some("a, b"));
    assert_eq!(of.value("nothing"), None);
}

#[test]
fn what_a_server_complains_of_is_left_out_and_told() {
    let mut of = configuration();
    for (complaint, told) in [
        (Complaint::Value("lc_time".into()), "/data/postgresql.conf line 5: lc_time = 'xx_XX' # why"),
        (Complaint::Value("lc_time".into()), "/data/more.conf line 1: LC_Time 'yy_YY'"),
        (Complaint::Value("lc_time".into()), ""),
        (Complaint::Unknown("fo".into()), ""),
        (
            Complaint::Unknown("work_mem".into()),
            "/data/postgresql.conf line 1: work_mem = 1MB, /data/more.conf line 3: Work_Mem 2MB",
        ),
        (Complaint::Line("/etc/conf.d/1.conf".into(), 2), "/etc/conf.d/1.conf line 2: bad line here"),
        (
            Complaint::Include("/etc/missing.conf".into()),
            "/data/postgresql.conf line 4: include '/etc/x/../missing.conf'",
        ),
        (Complaint::Include("/etc/conf.d".into()), "/data/postgresql.conf line 3: Include_Dir = '/etc/conf.d'"),
        (Complaint::Library("a".into()), ""),
    ] {
        assert_eq!(of.leave_out(&complaint).join(", "), told, "{complaint:?}");
    }
    let text = String::from_utf8(of.text()).unwrap();
    let left: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(left, ["foo = 1"]);
}

#[test]
fn a_log_is_read_for_what_the_server_does_not_take() {
    let log = "2026-01-01 00:00:00 UTC [7] LOG:  could not open configuration file \"/etc/missing.conf\": No such file\n\
               x LOG:  could not open configuration directory \"/etc/conf.d\": No such file or directory\n\
               LOG:  invalid value for parameter \"lc_messages\": \"xx_XX.UTF-8\"\n\
               LOG:  99999999 is outside the valid range for parameter \"Work_Mem\" (64 .. 2147483647)\n\
               LOG:  parameter \"jit\" requires a Boolean value\n\
               LOG:  unrecognized configuration parameter \"foo\" in file \"/d/postgresql.conf\" line 3\n\
               LOG:  unrecognized configuration parameter \"foo\" in file \"/d/postgresql.conf\" line 4\n\
               LOG:  syntax error in file \"/d/postgresql.conf\" line 12, near token \"here\"\n\
               LOG:  SSL is not supported by this build\n\
               LOG:  parameter \"restore_command\" changed to \"\"\n\
               LOG:  parameter \"port\" cannot be changed without restarting the server\n";
    let value = |name: &str| Complaint::Value(name.to_owned());
    let expected = [
        Complaint::Include("/etc/missing.conf".into()),
        Complaint::Include("/etc/conf.d".into()),
        value("lc_messages"),
        value("work_mem"),
        value("jit"),
        Complaint::Unknown("foo".to_owned()),
        Complaint::Line("/d/postgresql.conf".into(), 12),
        value("ssl"),
    ];
    let of = |log: &str| complaints(log).into_iter().map(|(complaint, _)| complaint).collect::<Vec<_>>();
    assert_eq!(of(log), []);
    let reloaded = "LOG:  configuration file \"/d/postgresql.conf\" contains errors; unaffected changes were applied\n";
    assert_eq!(of(&format!("{log}{reloaded}")), []);
    let refused = format!("{log}FATAL:  configuration file \"/d/postgresql.conf\" contains errors\n");
    assert_eq!(of(&refused), expected);
    assert_eq!(complaints(&refused)[2].1, "invalid value for parameter \"lc_messages\": \"xx_XX.UTF-8\"");
    for line in [
        "FATAL:  could not access file \"pg_cron\": No such file or directory",
        "FATAL:  could not access file \"$libdir/pg_cron\": No such file or directory",
        "FATAL:  could not load library \"/usr/lib/postgresql/15/lib/pg_cron.so\": undefined symbol: x",
    ] {
        assert_eq!(of(line), [Complaint::Library("pg_cron".into())], "{line}");
    }
}

#[test]
fn a_library_goes_out_of_a_list() {
    assert_eq!(without_library("a, \"$libdir/b.so\",c", "b").as_deref(), Some("\"a\", \"c\""));
    assert_eq!(without_library("a", "a").as_deref(), Some(""));
    assert_eq!(without_library("a,b", "x"), None);
}
