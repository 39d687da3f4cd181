// What never comes to the app.

package sidecar

import "testing"

func TestListedFieldsAreStrippedInEverySpelling(t *testing.T) {
	strip := strips([]string{"x-user", "x_role"})
	for name, want := range map[string]bool{
		"x-user": true, "x_user": true, "x-role": true, "x_role": true,
		"x-spiffe-id": true, "x_spiffe_id": true, "x-forwarded-client-cert": true,
		"x-users": false, "user": false, "x-request-id": false,
	} {
		if strip(name) != want {
			t.Errorf("strip(%s) = %t; want %t", name, !want, want)
		}
	}
	if none := strips(nil); none("x-user") || !none("x_spiffe_id") {
		t.Error("without a list those that claim an identity go, and no others")
	}
}
