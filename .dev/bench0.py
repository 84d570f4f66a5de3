# baseline timing of trainer at cifar scale: eager, compile; fp32/bf16
import torch,time,sys,json,os
from diffmoe.config import *
from diffmoe.data.images import ImageData
from diffmoe.training.trainer import Trainer
torch.backends.cuda.matmul.allow_tf32=True
dev=torch.device('cuda')
imgs=ImageData('rand',torch.randint(0,256,(50000,3,32,32),dtype=torch.uint8),torch.randint(0,10,(50000,)),10)
for sysn in ['dense','diffmoe','token_choice','expert_choice','expert_race']:
  for comp in [False,True]:
    moe=None if sysn=='dense' else dict(num_experts=16,router={'diffmoe':dict(kind='expert_choice'),'token_choice':dict(kind='baselines.token_choice:TokenChoice'),'expert_choice':dict(kind='expert_choice',pool='sample',predictor=False,inference='static'),'expert_race':dict(kind='baselines.expert_race:ExpertRace')}[sysn])
    c=from_dict(RunConfig,dict(model=dict(size='S',input_size=32,patch_size=4,in_channels=3,num_classes=10,learn_sigma=False,moe=moe),data=dict(name='x'),training=dict(batch_size=512,num_images=51200,precision='bf16',learning_rate=5e-4),runtime=dict(compile=comp)))
    try:
        t0=time.time(); t=Trainer(c,0,imgs,dev)
        for i in range(8): t.train_step()
        torch.cuda.synchronize(); t1=time.time()
        n=40
        for i in range(n): l=t.train_step()
        torch.cuda.synchronize(); dt=(time.time()-t1)/n
        print(sysn,'compile' if comp else 'eager','%.1f ms %.0f img/s'%(dt*1e3,512/dt),'startup %.1f'%(t1-t0),{k:round(v.item(),4) for k,v in l.items()},'mem %.1f'%(torch.cuda.max_memory_allocated()/2**30),flush=True)
        if sysn=='diffmoe':
            from torch.profiler import profile,ProfilerActivity
            with profile(activities=[ProfilerActivity.CUDA,ProfilerActivity.CPU]) as p:
                for i in range(5): t.train_step()
                torch.cuda.synchronize()
            open(os.environ['OUT']+'/prof_%s.txt'%('c' if comp else 'e'),'w').write(p.key_averages().table(sort_by='cuda_time_total',row_limit=60,max_name_column_width=90))
    except Exception as e: print(sysn,comp,'ERR',repr(e)[:600],flush=True)
    torch._dynamo.reset(); torch.cuda.reset_peak_memory_stats()
