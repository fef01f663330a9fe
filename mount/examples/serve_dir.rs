//! Mounts a local directory: `serve_dir SOURCE MOUNTPOINT [SCRATCH]`. With a scratch it is writable, and SOURCE stays
//! as it is. SOURCE must not change meanwhile, nor between two mounts with the same scratch.

#![allow(clippy::print_stderr, reason = "a command-line program")]

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use pgcairn_mount::{Attributes, Entry, Kind, Mount, NodeId, Options, ROOT, Scratch, Tree, Writes, boot_id};

struct Node {
    path: PathBuf,
    attributes: Attributes,
    file: Option<File>,
    children: Vec<Entry>,
}

/// A directory as it was when the program started. Nodes are numbered in sorted order, so that the same content gets
/// the same numbers again.
struct Directory {
    nodes: Vec<Node>,
}

impl Directory {
    fn read(root: &Path) -> io::Result<Self> {
        let mut tree = Self { nodes: Vec::new() };
        tree.add(root.to_owned())?;
        Ok(tree)
    }

    fn add(&mut self, path: PathBuf) -> io::Result<NodeId> {
        let metadata = fs::symlink_metadata(&path)?;
        let kind = match metadata.file_type() {
            kind if kind.is_dir() => Kind::Directory,
            kind if kind.is_symlink() => Kind::Symlink,
            _ => Kind::File,
        };
        let attributes = Attributes {
            kind,
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            size: metadata.len(),
            mtime: metadata.modified()?,
            volatile: false,
        };
        let file = if kind == Kind::File { Some(File::open(&path)?) } else { None };
        let index = self.nodes.len();
        self.nodes.push(Node { path: path.clone(), attributes, file, children: Vec::new() });
        if kind == Kind::Directory {
            let mut names = fs::read_dir(&path)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()?;
            names.sort();
            for name in names {
                let node = self.add(path.join(&name))?;
                let kind = self.node(node)?.attributes.kind;
                self.nodes[index].children.push(Entry { name, node, kind });
            }
        }
        Ok(NodeId(ROOT.0 + index as u64))
    }

    fn node(&self, node: NodeId) -> io::Result<&Node> {
        let index = (node.0 - ROOT.0) as usize;
        self.nodes.get(index).ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))
    }
}

impl Tree for Directory {
    fn lookup(&self, directory: NodeId, name: &OsStr) -> io::Result<Option<NodeId>> {
        let children = &self.node(directory)?.children;
        let found = children.binary_search_by(|entry| entry.name.as_os_str().cmp(name));
        Ok(found.ok().map(|index| children[index].node))
    }

    fn attributes(&self, node: NodeId) -> io::Result<Attributes> {
        Ok(self.node(node)?.attributes)
    }

    fn list(&self, directory: NodeId, from: usize, limit: usize) -> io::Result<Vec<Entry>> {
        Ok(self.node(directory)?.children.iter().skip(from).take(limit).cloned().collect())
    }

    fn read_link(&self, node: NodeId) -> io::Result<OsString> {
        Ok(fs::read_link(&self.node(node)?.path)?.into_os_string())
    }

    fn read_at(&self, node: NodeId, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let file = self.node(node)?.file.as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::EISDIR))?;
        let mut done = 0;
        while done < buf.len() {
            match file.read_at(&mut buf[done..], offset + done as u64)? {
                0 => break,
                count => done += count,
            }
        }
        Ok(done)
    }
}

fn explain(error: pgcairn_mount::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    error.hint().map_or(text.clone(), |hint| format!("{text}\nhint: {hint}"))
}

fn serve(arguments: &[OsString]) -> Result<(), String> {
    let (source, mountpoint, scratch) = match arguments {
        [source, mountpoint] => (source, mountpoint, None),
        [source, mountpoint, scratch] => (source, mountpoint, Some(scratch)),
        _ => return Err("usage: serve_dir SOURCE MOUNTPOINT [SCRATCH]".to_owned()),
    };
    let tree = Directory::read(Path::new(source)).map_err(|error| error.to_string())?;
    let identity = format!("directory {}", source.display());
    let boot = boot_id().map_err(explain)?;
    let scratch = scratch.map(|dir| Scratch::open(Path::new(dir), &identity, &boot)).transpose().map_err(explain)?;
    let mut options = Options::new(mountpoint);
    options.allow_other = nix::unistd::geteuid().is_root();
    options.writes = match std::env::var("SERVE_DIR_WRITES").as_deref() {
        Ok("through") => Writes::Through,
        Ok("back") => Writes::Back,
        _ => Writes::Passthrough,
    };
    let mount = Mount::new(Arc::new(tree), scratch, &options).map_err(explain)?;
    eprintln!("mounted; end with \"umount {}\"", mountpoint.display());
    mount.wait().map_err(explain)
}

fn main() -> ExitCode {
    match serve(&std::env::args_os().skip(1).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("serve_dir: {message}");
            ExitCode::FAILURE
        }
    }
}
