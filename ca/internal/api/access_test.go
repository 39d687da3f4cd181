// The access table, made from descriptors.

package api

import (
	"fmt"
	"slices"
	"testing"

	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"

	"merlon.dev/ca/capb"
)

var kinds = []capb.Caller{
	capb.Caller_CALLER_UNSPECIFIED, capb.Caller_CALLER_ANONYMOUS, capb.Caller_CALLER_AGENT, capb.Caller_CALLER_ADMIN, capb.Caller_CALLER_REPLICA,
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
		if table.permits(name, kinds) {
			t.Errorf("%q is open to somebody", name)
		}
	}
	if err := table.authorize(&Caller{Name: "x", Kinds: kinds}, "/test.S/New"); err == nil {
		t.Error("authorize let a caller of every kind through to an RPC without annotation")
	}
}

func TestUnspecifiedCallerMatchesNobody(t *testing.T) {
	table := access{"/x/Y": {capb.Caller_CALLER_UNSPECIFIED}}
	if table.permits("/x/Y", kinds) {
		t.Error("CALLER_UNSPECIFIED matches somebody")
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
				if len(table[name]) == 0 {
					t.Errorf("%s has no access annotation", name)
				}
				if table.permits(name, []capb.Caller{capb.Caller_CALLER_ANONYMOUS}) {
					open = append(open, name)
				}
				if svc.Name() != "Node" && table.permits(name, []capb.Caller{capb.Caller_CALLER_AGENT}) {
					t.Errorf("%s is open to agents", name)
				}
				if svc.Name() != "Replica" && table.permits(name, []capb.Caller{capb.Caller_CALLER_REPLICA}) {
					t.Errorf("%s is open to replicas", name)
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
