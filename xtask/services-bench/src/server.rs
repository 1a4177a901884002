//! The end that answers.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
};

use anyhow::{Context as _, Result};

use crate::keep_to;

/// A TCP connection that begins with this byte is taken in, and at its end the number of its bytes is
/// answered (64 bits, big-endian). Of any other, each piece is sent back as it comes.
pub(crate) const TAKE_IN: u8 = b'!';

/// Connections that are answered at the same time at each address: one is open in a case, and the last ones may be
/// on their way out.
const CONNECTIONS_MAX: usize = 4;

/// What a reader takes at once: as much as the kernel coalesces to one super-packet, twice.
pub(crate) const PIECE_BYTES: usize = 128 << 10;

/// Answers at each address by TCP and UDP, for ever.
///
/// # Errors
///
/// If an address cannot be had.
pub(crate) fn run(listen: &[SocketAddr]) -> Result<()> {
    let bound = listen.iter().map(|&address| {
        let listener = TcpListener::bind(address)?;
        // One each: an answer comes from the address that was asked.
        Ok((listener, UdpSocket::bind(address)?))
    });
    let bound: Vec<_> = bound
        .collect::<io::Result<_>>()
        .with_context(|| format!("listen on {listen:?}"))?;
    keep_to(1)?; // And the threads.
    println!("listening");
    thread::scope(|scope| {
        for (listener, socket) in &bound {
            for _ in 0..CONNECTIONS_MAX {
                scope.spawn(|| {
                    let mut piece = vec![0; PIECE_BYTES];
                    for stream in listener.incoming().flatten() {
                        // Clients that only connect end with a reset.
                        answer(stream, &mut piece).ok();
                    }
                });
            }
            scope.spawn(|| echo(socket));
        }
    });
    Ok(())
}

fn echo(socket: &UdpSocket) {
    let mut datagram = [0; 2048];
    loop {
        // Errors are ports that closed meanwhile.
        let Ok((length, from)) = socket.recv_from(&mut datagram) else {
            continue;
        };
        if let Some(bytes) = datagram.get(..length) {
            socket.send_to(bytes, from).ok();
        }
    }
}

fn answer(mut stream: TcpStream, piece: &mut [u8]) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut length = stream.read(piece)?;
    if piece.first() != Some(&TAKE_IN) {
        while let Some(bytes) = piece.get(..length).filter(|bytes| !bytes.is_empty()) {
            stream.write_all(bytes)?;
            length = stream.read(piece)?;
        }
        return Ok(());
    }
    let mut taken = 0_u64;
    while length > 0 {
        taken += length as u64;
        length = stream.read(piece)?;
    }
    stream.write_all(&taken.to_be_bytes())?;
    Ok(())
}
