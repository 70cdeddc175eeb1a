//! The protocol's calls, handed to those who do them.

use std::sync::Arc;

use mvm_guest_api::limits;
use mvm_guest_api::proto::guest_agent_server::GuestAgent;
use mvm_guest_api::proto::{
    Chunk, ClockReply, ClockRequest, DownloadRequest, DrainReply, DrainRequest, ExecInput, ExecOutput, LogsRequest, PrepareSleepReply,
    PrepareSleepRequest, ShutdownReply, ShutdownRequest, StatusReply, StatusRequest, UndrainReply, UndrainRequest, UploadInput,
    UploadReply, WakeReply, WakeRequest, logs_request,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::agent::Agent;
use crate::log::Ring;
use crate::{exec, lifecycle, transfer};

/// One agent as a service.
#[derive(Clone)]
pub struct Service(pub Arc<Agent>);

type Reply<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl GuestAgent for Service {
    type ExecStream = ReceiverStream<Result<ExecOutput, Status>>;
    type DownloadStream = ReceiverStream<Result<Chunk, Status>>;
    type LogsStream = ReceiverStream<Result<Chunk, Status>>;

    async fn status(&self, _: Request<StatusRequest>) -> Reply<StatusReply> {
        Ok(Response::new(self.0.status()))
    }

    async fn exec(&self, request: Request<Streaming<ExecInput>>) -> Reply<Self::ExecStream> {
        let (output, receiver) = mpsc::channel(8);
        exec::start(self.0.clone(), request.into_inner(), output).await?;
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn upload(&self, request: Request<Streaming<UploadInput>>) -> Reply<UploadReply> {
        self.0.check_handler("copy")?;
        transfer::upload(request.into_inner()).await.map(Response::new)
    }

    async fn download(&self, request: Request<DownloadRequest>) -> Reply<Self::DownloadStream> {
        self.0.check_handler("copy")?;
        let receiver = transfer::download(&request.into_inner().path)?;
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn logs(&self, request: Request<LogsRequest>) -> Reply<Self::LogsStream> {
        self.0.check_handler("logs")?;
        let request = request.into_inner();
        let agent = self.0.clone();
        let workload = request.source() == logs_request::Source::Workload;
        let (sender, receiver) = mpsc::channel(4);
        tokio::spawn(async move {
            let ring = if workload { &agent.workload.output } else { &agent.log };
            // Ends with the caller.
            let _ = copy_log(ring, &request, &sender).await;
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn drain(&self, request: Request<DrainRequest>) -> Reply<DrainReply> {
        let limit = lifecycle::capped(request.into_inner().deadline_ms);
        Ok(Response::new(lifecycle::drain(&self.0, limit).await))
    }

    async fn undrain(&self, _: Request<UndrainRequest>) -> Reply<UndrainReply> {
        lifecycle::undrain(&self.0);
        Ok(Response::new(UndrainReply {}))
    }

    async fn prepare_sleep(&self, request: Request<PrepareSleepRequest>) -> Reply<PrepareSleepReply> {
        let limit = lifecycle::capped(request.into_inner().deadline_ms);
        let warnings = lifecycle::prepare_sleep(&self.0, limit).await?;
        Ok(Response::new(PrepareSleepReply { warnings }))
    }

    async fn wake(&self, request: Request<WakeRequest>) -> Reply<WakeReply> {
        lifecycle::wake(&self.0, request.into_inner()).await.map(Response::new)
    }

    async fn clock(&self, request: Request<ClockRequest>) -> Reply<ClockReply> {
        lifecycle::step_clock(&self.0, request.into_inner().step_ns).map(Response::new)
    }

    async fn shutdown(&self, request: Request<ShutdownRequest>) -> Reply<ShutdownReply> {
        let grace = lifecycle::capped(request.into_inner().grace_ms);
        let agent = self.0.clone();
        tokio::spawn(async move { lifecycle::shut_down(&agent, grace).await });
        Ok(Response::new(ShutdownReply {}))
    }
}

async fn copy_log(
    ring: &Ring,
    request: &LogsRequest,
    sender: &mpsc::Sender<Result<Chunk, Status>>,
) -> Result<(), mpsc::error::SendError<Result<Chunk, Status>>> {
    let mut place = ring.start(request.tail);
    loop {
        let (bytes, next) = if request.follow {
            tokio::select! {
                more = ring.read_more(place, limits::CHUNK) => more,
                () = sender.closed() => return Ok(()),
            }
        } else {
            ring.read(place, limits::CHUNK)
        };
        if bytes.is_empty() {
            return Ok(());
        }
        place = next;
        sender.send(Ok(Chunk { data: bytes.into() })).await?;
    }
}
