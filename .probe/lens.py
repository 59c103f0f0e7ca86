import sys, torch
sys.path.insert(0,"tests")
from attention_cases import make_call, Call
from flashfuse.kernels.launch import attention_forward
def on_gpu(call):
    q,k,v=(x.cuda() for x in (call.q,call.k,call.v)); return Call(call.spec,q,k,v,[c.cuda() for c in call.captured],call.sizes)
rms=lambda x: x.double().square().mean().sqrt().item()
for heads in (2,64):
  for n in (1000,4000):
    c=on_gpu(make_call("qk * 0.125",(1,heads,1,64),n,dtype=torch.float32))
    e,g=c.exact()[0],c.eager()[0]; o=attention_forward(*c.tensors)[0]
    print(heads,n,"fused",rms(o.double()-e),(o.double()-e).abs().max().item(),"eager",rms(g.double()-e),(g.double()-e).abs().max().item(),"floor",4*1.2e-7*e.abs().max().item())
