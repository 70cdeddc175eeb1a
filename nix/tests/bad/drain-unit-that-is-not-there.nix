# role: worker
# expect: mvm: role worker: mvm.worker.drainUnits names wrok.service, and the image has no such unit
{
  mvm.worker.drainUnits = [ "wrok.service" ];
}
