package api

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"merlon.dev/ca/capb"
)

// What is taken as a registration entry is the same when it is told again.
func FuzzEntryFromProto(f *testing.F) {
	for _, e := range []*capb.Entry{
		{},
		{SpiffeId: "spiffe://td/a", ParentId: "spiffe://td/agent/n", Selectors: []*capb.Selector{{Type: "unix", Value: "uid:1"}}, Role: capb.Role_ROLE_REGISTRAR, RolePrefix: "/a"},
		{SpiffeId: "spiffe://td/a", DnsNames: []string{"a.b"}, X509SvidTtlSeconds: 60, FederatesWith: []string{"other.test"}, KeyDelivery: capb.KeyDelivery_KEY_DELIVERY_BOTH},
	} {
		b, err := proto.Marshal(e)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var p capb.Entry
		if proto.Unmarshal(b, &p) != nil {
			return
		}
		e, err := entryFromProto(&p)
		if err != nil {
			return
		}
		told := entryToProto(e)
		again, err := entryFromProto(told)
		if err != nil {
			t.Fatalf("%v is read, told as %v, and then: %v", &p, told, err)
		}
		if diff := cmp.Diff(told, entryToProto(again), protocmp.Transform()); diff != "" {
			t.Fatalf("%v is told differently the second time: %s", &p, diff)
		}
	})
}

// A token is what stands behind the scheme, as it stands there.
func FuzzBearerToken(f *testing.F) {
	for _, s := range []string{"Bearer a.b.c", "bearer x", "Bearer", "Bearer ", "Basic YTpi", "Bearer  a", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, header string) {
		token, ok := BearerToken(header)
		if ok != (len(header) >= 7 && strings.EqualFold(header[:7], "Bearer ")) || ok && header[7:] != token || !ok && token != "" {
			t.Fatalf("BearerToken(%q) = %q, %t", header, token, ok)
		}
	})
}
