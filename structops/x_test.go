package structops
import ("testing";"fmt")
func TestX(t *testing.T) {
 s,err:=Parse(fixture(t,"mixed")); if err!=nil{t.Fatal(err)}
 for _,o:=range s.Ops { fmt.Printf("%q %q %v\n",o.Map,o.Name,o.Check())}
 fmt.Println(s.Warnings)
 b:=patch(t, fixture(t,"basic"), ".BTF.ext\x00", ".XXX.ext\x00")
 s,err=Parse(b); fmt.Println(err); if err==nil { o,err:=s.Load(); fmt.Println(o,err)}
}
