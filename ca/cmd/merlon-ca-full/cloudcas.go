//go:build cloudcas

package main

// Google Cloud CAS as upstream authority.
import _ "github.com/smallstep/certificates/cas/cloudcas"
