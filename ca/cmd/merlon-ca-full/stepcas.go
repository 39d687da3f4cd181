//go:build stepcas

package main

// Step-ca as upstream authority.
import _ "github.com/smallstep/certificates/cas/stepcas"
