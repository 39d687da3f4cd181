// What entries learn to say is closed to registrars until somebody opens it.

package api

import (
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/role"
	"merlon.dev/sdk/svid"
)

// others are values for the fields of an entry, by type.
var others = map[reflect.Type]any{
	reflect.TypeFor[string]():            "x",
	reflect.TypeFor[[]string]():          []string{"x"},
	reflect.TypeFor[uint64]():            uint64(1),
	reflect.TypeFor[bool]():              true,
	reflect.TypeFor[time.Duration]():     time.Minute,
	reflect.TypeFor[time.Time]():         time.Unix(1e9, 0),
	reflect.TypeFor[spiffeid.ID]():       spiffeid.RequireFromString("spiffe://shop.test/ns/shop/other"),
	reflect.TypeFor[[]entry.Selector]():  []entry.Selector{{Type: "unix", Value: "uid:1"}},
	reflect.TypeFor[entry.KeyDelivery](): entry.ByWorkload,
	reflect.TypeFor[role.Role]():         role.Role{Name: role.Viewer},
}

func TestRegistrarSaysNothingButWhatIsListed(t *testing.T) {
	s, _ := newService(t)
	c := &Caller{Using: []role.Role{{Name: role.Registrar, Prefix: "/ns/shop"}}}
	open := []string{"SPIFFEID", "ParentID", "Selectors", "X509SVIDTTL", "JWTSVIDTTL", "Hint", "KeyDelivery", "ExpiresAt"}
	for _, field := range reflect.VisibleFields(reflect.TypeFor[entry.Entry]()) {
		e := &entry.Entry{SPIFFEID: spiffeid.RequireFromString("spiffe://shop.test/ns/shop/web")}
		value, ok := others[field.Type]
		if !ok {
			t.Fatalf("%s: this test knows no value of type %s", field.Name, field.Type)
		}
		reflect.ValueOf(e).Elem().FieldByIndex(field.Index).Set(reflect.ValueOf(value))
		err := s.mayRegister(c, e)
		if want := slices.Contains(open, field.Name); want != (err == nil) || err != nil && status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v; open to registrars = %t", field.Name, err, want)
		}
	}
}

// A prefix does not make agents, or the CA, a registrar's.
func TestReservedIDsAreNoRegistrars(t *testing.T) {
	s, _ := newService(t)
	for prefix, path := range map[string]string{"/agent": "/agent/n1", "/agent/n1": "/agent/n1", "/ca": "/ca"} {
		c := &Caller{Using: []role.Role{{Name: role.Registrar, Prefix: prefix}}}
		id := spiffeid.RequireFromPath(td, path)
		if err := s.mayTouch(c, id); status.Code(err) != codes.PermissionDenied {
			t.Errorf("registrar of %s touches %s: %v; want PermissionDenied", prefix, id, err)
		}
		if err := s.mayRevoke(c, svid.Revocation{SPIFFEID: id.String()}); status.Code(err) != codes.PermissionDenied {
			t.Errorf("registrar of %s revokes %s: %v; want PermissionDenied", prefix, id, err)
		}
	}
}

// A caller whom nothing let in covers nothing.
func TestNoRoleCoversNothing(t *testing.T) {
	s, _ := newService(t)
	c := &Caller{Roles: everyRole}
	id := spiffeid.RequireFromString("spiffe://shop.test/ns/shop/web")
	if c.everywhere() || c.covers(id) || s.mayTouch(c, id) == nil {
		t.Error("a caller that holds roles, none of which opened the call, may touch an entry")
	}
}
