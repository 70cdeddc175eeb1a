//! From a byte stream to a served connection.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use mvm_guest_api::handshake::{self, Heard};
use mvm_guest_api::limits;
use mvm_guest_api::proto::guest_agent_server::GuestAgentServer;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::Semaphore;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

use crate::port::{HangUp, Port};
use crate::service::Service;

/// Most connections on vsock at once.
const MAX_CONNECTIONS: usize = 16;
/// `EAFNOSUPPORT`, `EADDRNOTAVAIL`, `ENODEV`: what the kernel says where there is no vsock.
const NO_VSOCK: [i32; 3] = [97, 99, 19];

/// Serves a port for ever, one session after the other.
///
/// # Errors
/// When the device itself fails.
pub async fn serve_port(port: Arc<Port>, service: Service) -> io::Result<()> {
    loop {
        let mut idle = port.stream(HangUp::Wait);
        let first = await_session(&mut idle).await?.unwrap_or_default();
        // A session that broke is the host's affair; the next connect line begins another.
        let _ = serve(First::new(first, port.stream(HangUp::Ends)), service.clone()).await;
    }
}

/// Serves one connection that begins with a connect line, as a port's does.
///
/// # Errors
/// When the stream fails.
pub async fn serve_with_handshake<S>(mut stream: S, service: Service) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    match await_session(&mut stream).await? {
        Some(first) => serve(First::new(first, stream), service).await,
        None => Ok(()),
    }
}

/// Serves the host on vsock, where there is such a device; returns at once where there is none.
///
/// # Errors
/// When the port cannot be listened on.
pub async fn serve_vsock(service: Service) -> io::Result<()> {
    let address = VsockAddr::new(VMADDR_CID_ANY, mvm_guest_api::VSOCK_PORT);
    let listener = match VsockListener::bind(address) {
        Ok(listener) => listener,
        Err(error) if NO_VSOCK.contains(&error.raw_os_error().unwrap_or(0)) => return Ok(()),
        Err(error) => return Err(error),
    };
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let (stream, peer) = listener.accept().await?;
        // Programs of the guest must not command its agent.
        let (VMADDR_CID_HOST, Ok(place)) = (peer.cid(), places.clone().try_acquire_owned()) else {
            continue;
        };
        let service = service.clone();
        tokio::spawn(async move {
            // What breaks a connection is its client's affair.
            let _ = serve(stream, service).await;
            drop(place);
        });
    }
}

/// Answers connect lines until HTTP/2 begins, and returns what was read of it; `None` when the stream ends.
async fn await_session<S>(stream: &mut S) -> io::Result<Option<Vec<u8>>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut buffer = Vec::with_capacity(512);
    let mut answered = false;
    loop {
        match handshake::hear(&buffer, answered) {
            Heard::Connect { nonce, consumed } => {
                buffer.drain(..consumed);
                answered = true;
                stream.write_all(&nonce.ok_line()).await?;
            }
            Heard::Session => return Ok(Some(buffer)),
            Heard::More { discard } => {
                buffer.drain(..discard);
                if stream.read_buf(&mut buffer).await? == 0 {
                    return Ok(None);
                }
            }
        }
    }
}

/// Speaks HTTP/2 until the peer goes away or breaks the protocol.
///
/// # Errors
/// What ended the connection, unless it was its proper end.
pub async fn serve<S>(stream: S, service: Service) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service =
        GuestAgentServer::new(service).max_decoding_message_size(limits::MAX_MESSAGE).max_encoding_message_size(limits::MAX_MESSAGE);
    http2::Builder::new(TokioExecutor::new())
        .max_concurrent_streams(limits::MAX_STREAMS)
        .max_header_list_size(16 << 10)
        .initial_stream_window_size(256 << 10)
        .initial_connection_window_size(1 << 20)
        .max_send_buf_size(256 << 10)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service))
        .await
        .map_err(io::Error::other)
}

/// A stream some of which was read already.
struct First<S> {
    first: io::Cursor<Vec<u8>>,
    stream: S,
}

impl<S> First<S> {
    fn new(first: Vec<u8>, stream: S) -> First<S> {
        First { first: io::Cursor::new(first), stream }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for First<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let filled = buf.filled().len();
        let _ = Pin::new(&mut self.first).poll_read(cx, buf)?;
        if buf.filled().len() > filled {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for First<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
