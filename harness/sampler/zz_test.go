package sampler
import ("testing";"time";"net/netip";"github.com/cilium/ebpf";"ccload/internal/kerneltest";"ccload/harness/flow";"ccload/harness/trace";"fmt";"context")
func TestZZ(t *testing.T) {
	kerneltest.Privileged(t)
	
	c, err := ebpf.EnableStats(0); if err!=nil {t.Fatal(err)}; defer c.Close()
	ns := loopback(t)
	to := netip.AddrPortFrom(addr, 20000)
	r,_ := flow.Listen(ns,to,"cubic"); defer r.Close()
	s,_ := flow.Open(ns, netip.AddrPortFrom(addr,10000),"cubic"); defer s.Close()
	ctx,cancel := context.WithCancel(context.Background()); over:=make(chan int)
	go func(){ s.Send(ctx,to,time.Hour,0); close(over)}()
	for range 3 {
	a,err := OpenAck(ns,0); if err!=nil {t.Fatal(err)}
	n:=0
	a.Start(Target{Flows: map[uint16]int32{10000:1}, Sink: func(trace.Sample){n++}})
	time.Sleep(time.Second)
	p:=a.coll.Programs["tcp_probe"]; i,_ := p.Stats(); d,k := i.Runtime,i.RunCount
	fmt.Println(d, k, int(d)/int(k+1), n)
	a.Close()
	}
	cancel(); <-over
}
