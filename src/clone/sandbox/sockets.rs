//! Sockets of the machine, and the loopback device of a network namespace.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket};

/// The kernel's list of Unix sockets.
const UNIX_SOCKETS: &str = "/proc/net/unix";
/// `__SO_ACCEPTCON`: the socket listens.
const LISTENS: u32 = 1 << 16;
/// The loopback device is the first of every network namespace.
const LOOPBACK: u32 = 1;
/// Messages and flags of netlink (`linux/netlink.h`, `linux/rtnetlink.h`, `linux/if.h`).
const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const IFF_UP: u32 = 1;

/// Paths of the sockets in the file system on which somebody listens; none where the kernel does not say.
pub(super) fn listening() -> Vec<PathBuf> {
    parse(&fs::read_to_string(UNIX_SOCKETS).unwrap_or_default())
}

/// Lines of: address, references, protocol, flags, type, state, inode, path.
fn parse(text: &str) -> Vec<PathBuf> {
    let path = |line: &str| {
        let mut fields = line.splitn(8, ' ').map(str::trim);
        let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
        // the inode is padded
        let path = line.get(line.find(" /")? + 1..)?;
        (flags & LISTENS != 0).then(|| PathBuf::from(path))
    };
    let mut paths: Vec<PathBuf> = text.lines().skip(1).filter_map(path).collect();
    paths.sort_unstable();
    paths.dedup();
    paths
}

/// Brings up the loopback device: servers of version 13 and 14 send their statistics over it.
pub(super) fn loopback_up() -> nix::Result<()> {
    let kernel = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    let mut message = Vec::with_capacity(32);
    // the header: length, type, flags, sequence number, sender
    message.extend(32u32.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    message.extend([0; 8]);
    // the device: family and type, number, flags, which of them are set
    message.extend([0; 4]);
    message.extend(LOOPBACK.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    sendto(kernel.as_raw_fd(), &message, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut answer = [0; 256];
    let len = recv(kernel.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let kind = answer.get(4..6).filter(|_| len >= 20).map(|kind| u16::from_ne_bytes([kind[0], kind[1]]));
    let code = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    match (kind, code) {
        (Some(NLMSG_ERROR), 0) => Ok(()),
        (_, code) => Err(nix::errno::Errno::from_raw(-code)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_that_listen_are_found() {
        let text = "Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 10377 /run/postgresql/.s.PGSQL.5432\n\
            0000000000000000: 00000003 00000000 00000000 0001 03   911 /run/postgresql/.s.PGSQL.5432\n\
            0000000000000000: 00000002 00000000 00010000 0001 01    12 @/abstract\n\
            0000000000000000: 00000002 00000000 00000000 0002 01 10381 /run/systemd/notify\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 10381\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 10382 /srv/with space/sock\n";
        assert_eq!(
            parse(text),
            [PathBuf::from("/run/postgresql/.s.PGSQL.5432"), PathBuf::from("/srv/with space/sock")]
        );
    }
}
