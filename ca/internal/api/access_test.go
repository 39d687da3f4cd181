// The access table, made from descriptors.

package api

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"pgregory.net/rapid"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/role"
)

var kinds = []capb.Caller{
	capb.Caller_CALLER_UNSPECIFIED, capb.Caller_CALLER_ANONYMOUS, capb.Caller_CALLER_AGENT, capb.Caller_CALLER_ADMIN, capb.Caller_CALLER_REPLICA,
}

var everyRole = []role.Role{{Name: role.Viewer}, {Name: role.Registrar, Prefix: "/ns/shop"}, {Name: role.PolicyPublisher}, {Name: role.Operator}, {}}

// everybody is a caller of every kind and role at once.
func everybody() *Caller { return &Caller{Name: "x", Kinds: kinds, Roles: everyRole} }

// may says whether a caller of one kind may call name, with every role.
func (t access) may(name string, kind capb.Caller) bool {
	_, ok := t.permits(name, &Caller{Kinds: []capb.Caller{kind}, Roles: everyRole})
	return ok
}

// Somebody adds an RPC and does not think of its callers: nobody may call it.
func TestUnannotatedRPCIsOpenToNobody(t *testing.T) {
	str := func(s string) *string { return &s }
	method := &descriptorpb.MethodDescriptorProto{Name: str("New"), InputType: str(".test.M"), OutputType: str(".test.M")}
	file, err := protodesc.NewFile(&descriptorpb.FileDescriptorProto{
		Name: str("test.proto"), Package: str("test"), Syntax: str("proto3"),
		MessageType: []*descriptorpb.DescriptorProto{{Name: str("M")}},
		Service:     []*descriptorpb.ServiceDescriptorProto{{Name: str("S"), Method: []*descriptorpb.MethodDescriptorProto{method}}},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	table := accessOf(file, capb.File_ca_capb_node_proto)
	for _, name := range []string{"/test.S/New", "/test.S/Unheard", "", "/merlon.ca.v1.Node/attest"} {
		if _, ok := table.permits(name, everybody()); ok {
			t.Errorf("%q is open to somebody", name)
		}
	}
	if err := table.authorize(everybody(), "/test.S/New"); err == nil {
		t.Error("authorize let a caller of every kind through to an RPC without annotation")
	}
}

func TestUnspecifiedCallerMatchesNobody(t *testing.T) {
	table := access{"/x/Y": {callers: []capb.Caller{capb.Caller_CALLER_UNSPECIFIED}}}
	if _, ok := table.permits("/x/Y", everybody()); ok {
		t.Error("CALLER_UNSPECIFIED matches somebody")
	}
}

// An RPC for administrators that names no role is for none of them.
func TestAdminRPCWithoutRolesIsOpenToNobody(t *testing.T) {
	table := access{"/x/Y": {callers: []capb.Caller{capb.Caller_CALLER_ADMIN}}}
	if _, ok := table.permits("/x/Y", everybody()); ok {
		t.Error("an RPC without roles is open to an administrator")
	}
	if got := roleNames([]capb.Role{capb.Role_ROLE_UNSPECIFIED}); got != nil {
		t.Errorf("ROLE_UNSPECIFIED is the role %v", got)
	}
}

// An RPC for administrators that does not say whether it changes something is for
// none of them: it could change something without a record.
func TestAdminRPCOfUnknownEffectIsOpenToNobody(t *testing.T) {
	r := rule{callers: []capb.Caller{capb.Caller_CALLER_ADMIN}, roles: []role.Name{role.Operator}}
	table := access{"/x/Y": r}
	if _, ok := table.permits("/x/Y", everybody()); ok {
		t.Error("an RPC of unknown effect is open to an administrator")
	}
	if err := table.authorize(everybody(), "/x/Y"); err == nil || !strings.Contains(err.Error(), "open to nobody") {
		t.Errorf("authorize = %v; want that it is open to nobody", err)
	}
	for what, known := range map[string]rule{"reads": {callers: r.callers, roles: r.roles, reads: true}, "act": {callers: r.callers, roles: r.roles, act: "do", approval: capb.Approval_APPROVAL_NONE}} {
		if _, ok := (access{"/x/Y": known}).permits("/x/Y", everybody()); !ok {
			t.Errorf("an RPC that says %s is open to nobody", what)
		}
	}
}

// Who loses a role can call nothing that was closed before.
func TestLosingARoleAddsNoPermission(t *testing.T) {
	table := accessTable()
	rapid.Check(t, func(rt *rapid.T) {
		has := rapid.SliceOf(rapid.SampledFrom(everyRole)).Draw(rt, "roles")
		lost := rapid.SliceOfN(rapid.SampledFrom(everyRole), 0, 2).Draw(rt, "lost")
		before, after := Anonymous(), Anonymous()
		before.take(has...)
		after.take(slices.DeleteFunc(slices.Clone(has), func(r role.Role) bool { return slices.Contains(lost, r) })...)
		for method := range table {
			if table.authorize(after, method) == nil && table.authorize(before, method) != nil {
				rt.Fatalf("%s is open with %s and closed with %s", method, role.List(after.Roles), role.List(before.Roles))
			}
			for _, r := range after.Using {
				if !slices.Contains(table[method].roles, r.Name) {
					rt.Fatalf("%s: the role used is %s, which does not open it", method, r)
				}
			}
		}
	})
}

// Who is refused learns which role it takes and which it has.
func TestRefusalNamesTheRoles(t *testing.T) {
	c := &Caller{Name: "spiffe://shop.test/ci"}
	c.take(role.Role{Name: role.Viewer})
	err := accessTable().authorize(c, capb.Admin_PushPolicy_FullMethodName)
	want := "spiffe://shop.test/ci may not call /merlon.ca.v1.Admin/PushPolicy, which is for: policy-publisher or operator; its role is viewer"
	if st := status.Convert(err); st.Code() != codes.PermissionDenied || st.Message() != want {
		t.Errorf("authorize = %v; want %s", err, want)
	}
}

// A role is called the same in the protos and everywhere else.
func TestRolesOfTheProtosAreThoseOfTheCA(t *testing.T) {
	for _, n := range role.Names() {
		if r := roleToProto(n); r == capb.Role_ROLE_UNSPECIFIED || roleName(r) != n {
			t.Errorf("%s is %s in the protos, which is %s", n, r, roleName(r))
		}
	}
	if len(capb.Role_name) != len(role.Names())+1 {
		t.Errorf("the protos have %d roles; want %v and none", len(capb.Role_name), role.Names())
	}
	if roleToProto("") != capb.Role_ROLE_UNSPECIFIED {
		t.Error("no role is one in the protos")
	}
}

// checkEffect: an RPC that is named like one that changes something is an act.
func checkEffect(t *testing.T, name string, r rule) {
	t.Helper()
	method := name[strings.LastIndex(name, "/")+1:]
	onlyReads := slices.ContainsFunc([]string{"Get", "List", "Prove", "Fetch"}, func(verb string) bool { return strings.HasPrefix(method, verb) })
	if r.reads == (r.act != "") || r.reads != onlyReads {
		t.Errorf("%s: reads: %v, act: %q; what does not get, list, prove or fetch is an act, and what does is none", name, r.reads, r.act)
	}
}

// Every RPC of the CA says who may call it, and no RPC that changes something
// or tells secrets is for everyone.
func TestEveryRPCIsAnnotated(t *testing.T) {
	table := accessTable()
	var open []string
	protoregistry.GlobalFiles.RangeFilesByPackage("merlon.ca.v1", func(f protoreflect.FileDescriptor) bool {
		for i := range f.Services().Len() {
			svc := f.Services().Get(i)
			for j := range svc.Methods().Len() {
				name := fmt.Sprintf("/%s/%s", svc.FullName(), svc.Methods().Get(j).Name())
				if table[name].whom() == "" {
					t.Errorf("%s has no access annotation, or is for administrators without a role", name)
				}
				if table.may(name, capb.Caller_CALLER_ANONYMOUS) {
					open = append(open, name)
				}
				if svc.Name() != "Node" && table.may(name, capb.Caller_CALLER_AGENT) {
					t.Errorf("%s is open to agents", name)
				}
				if svc.Name() != "Replica" && table.may(name, capb.Caller_CALLER_REPLICA) {
					t.Errorf("%s is open to replicas", name)
				}
				if svc.Name() == "Admin" {
					checkEffect(t, name, table[name])
				}
				if svc.Name() == "Admin" != slices.Contains(table[name].roles, role.Operator) {
					t.Errorf("%s: operators may call Admin, all of it, and nothing else", name)
				}
			}
		}
		return true
	})
	slices.Sort(open)
	if want := []string{capb.Node_Attest_FullMethodName, capb.Replica_Join_FullMethodName}; !slices.Equal(open, want) {
		t.Errorf("open to everyone: %s; want only what brings a token: %s", open, want)
	}
}
